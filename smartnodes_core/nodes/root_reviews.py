"""What the chain said before a round that this validator did not see coming (it was away): put together again from the
chain's events and from what other validators keep, so that a frozen root can be judged all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartnodes_core.errors import RecordError
from smartnodes_core.records import Proposal
from smartnodes_core.rounds import RoundContext, RoundProposal, Standing

if TYPE_CHECKING:
    from smartnodes_core.nodes.round_books import RoundBooks

#: Rounds that are looked through for the root before a round: one that allots nothing may set none.
MAX_BACK = 8


class RootReview:
    """See the module. Members are taken as they are now: who was blacklisted in the round had a fraud in it, and who
    has come since had no work in it.
    """

    def __init__(self, books: RoundBooks):
        self._books = books

    def before(self, number: int) -> tuple[Proposal, RoundProposal, RoundContext]:
        """What a round has executed, and the context in which it did. Asks the chain and other validators. Raises
        RecordError or Unavailable where it cannot be known, ChainError.
        """
        books, chain, network_id = self._books, self._books.chain, self._books.network_id
        proposal, content = books.executed_proposal(number)
        if number == 1:
            raise RecordError("since when the first round may emit is not known")
        if content.parameters:
            raise RecordError(f"round {number} changes parameters: those before are not known")
        _, last = books.executed_proposal(number - 1)
        executed = chain.executed_round(network_id, number - 1)
        members = chain.members(network_id)
        context = RoundContext(
            domain=chain.domain,
            network_id=network_id,
            round=number,
            view=content.view,
            previous_hash=content.previous_hash,
            until_s=content.until_s,
            emission_wei=chain.emission_between_wei(network_id, last.until_s, content.until_s),
            num_validators=sum(member.role == "validator" and member.live for member in members),
            parameters=chain.parameters(network_id),
            signers=executed.signers if executed else (),
            standings={m.account: Standing(m.index, m.reputation, m.stake_wei) for m in members},
            totals_wei=self._totals_wei(number - 1, last),
        )
        return proposal, content, context

    def _totals_wei(self, number: int, content: RoundProposal) -> dict[bytes, int]:
        """The cumulative rewards under the last root that was set up to a round."""
        for back in range(1, MAX_BACK + 1):
            if any(content.rewards_root):
                return self._books.rewards.under(content.rewards_root)
            if number - back < 1:
                return {}
            _, content = self._books.executed_proposal(number - back)
        raise RecordError(f"no root was set in {MAX_BACK} rounds up to {number}")
