"""Rounds over a whole network: what was verified reaches the chain, and nothing else does."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from smartnodes_core.ballots import Motion
from smartnodes_core.chain.memory import MemoryChain
from smartnodes_core.chain.proposal import Parameters, RoundProposal
from smartnodes_core.chain.signing import sign_digest
from smartnodes_core.errors import AuthorityError, ChainUnreachableError, RecordError
from smartnodes_core.journal import EquivocationError, Journal
from smartnodes_core.nodes.balloting import MAX_EARLY
from smartnodes_core.nodes.rewards import claim
from smartnodes_core.nodes.validator import ValidatorSettings
from smartnodes_core.nodes.views import ViewClock
from smartnodes_core.nodes.voting import Signer
from smartnodes_core.records import Proposal, Vote
from smartnodes_core.rounds import COMPLETE_VIEWS, draw_proposers, evidence_root, in_view, propose

from .conftest import FAST

NETWORK = 1


def state_of(net):
    return net.user.chain.round_state(NETWORK)


def reputation(net, citizen):
    return net.user.chain.member(NETWORK, citizen.account).reputation


class Booth:
    """A round that is due, its proposer in this view, and a voter; nobody's rounds run by themselves."""

    def __init__(self, net, eventually, view: int = 0) -> None:
        self.net = net
        eventually(lambda: state_of(net).chain_time_s >= state_of(net).earliest_at_s)
        self.state = state_of(net)
        self.order = draw_proposers(net.user.chain.validators(NETWORK), self.state.number + 1)
        by_account = {validator.account: validator for validator in net.validators}
        self.proposer, self.voter = by_account[self.order[view]], by_account[self.order[(view + 1) % 4]]
        for validator in net.validators:
            validator.role.rounds.books.follow(self.state)

    def proposal(self, view: int = 0) -> tuple[Proposal, RoundProposal]:
        candidate = self.proposer.role.rounds._propose(self.state, view, len(self.order))
        return candidate.proposal, candidate.content

    def sign(self, content: RoundProposal, *signers) -> list[bytes]:
        """Votes as they go with a proposal: its proposer's, if nobody is named."""
        digest = self.net.user.chain.proposal_digest(content)
        keys = [each.account_key for each in signers or (self.proposer,)]
        return [content.view.to_bytes(4, "big") + sign_digest(key, digest) for key in keys]

    def vote(self, proposal: Proposal, content: RoundProposal | None = None, ballots=None, voter=None) -> Vote:
        """What the voter answers to a proposal, with other content if that is given."""
        if content is not None:
            proposal = msgspec.structs.replace(proposal, content=content.encode())
        ballots = self.sign(RoundProposal.decode(proposal.content)) if ballots is None else ballots
        voter = voter or self.voter
        reply = self.proposer.node.call(voter.key, "propose", {"ballots": ballots}, [proposal.encode()])
        return Vote.decode(reply.body)

    def judge(self, proposal: Proposal, content: RoundProposal) -> tuple[Any, list[str]]:
        """What the voter thinks of content, whoever proposes it."""
        motion = Motion.of(proposal, content)
        return self.voter.role.rounds._votes._check(self.state, motion, content.view, 4, [self.proposer.key])

    def carry(self, view: int = 0) -> None:
        """The proposer does all of its turn."""
        desk = self.proposer.role.rounds
        box = desk.ballots.box(self.state)
        motion = desk._make(self.state, box, view, len(self.order))
        desk._carry(self.state, view, self.order, box, motion)


@pytest.fixture
def audited(net, eventually):
    """A job of two stages with three audited steps, one of which is out of its window."""
    job = net.open()
    net.work(job, range(3))
    eventually(lambda: net.everyone_has(12, job))
    return job


# -- the story --------------------------------------------------------------------------------------------------------


def test_a_round_carries_verdicts_and_settled_work_and_equal_work_earns_equal_pay(make_net, eventually):
    net = make_net()
    net.start(rounds=True)
    job = net.open()
    net.work(job, range(6))
    eventually(lambda: net.everyone_has(24, job))
    eventually(lambda: reputation(net, net.workers[0]) > 1 and reputation(net, net.workers[1]) > 1)
    net.user.role.close_job(job)
    keys = [validator.key for validator in net.validators]
    worker, other = net.workers[:2]

    def all_settled():
        return all(job.id not in validator.role.audits.jobs for validator in net.validators)

    eventually(all_settled)
    paid = [claim(each.node, each.chain, NETWORK, keys, each.account) for each in (worker, other)]
    assert paid[0] == paid[1] > 0
    assert claim(worker.node, worker.chain, NETWORK, keys, worker.account) == 0
    assert worker.chain.balances(worker.account).sno_wei > 0
    executed = [list(validator.role.rounds.executed) for validator in net.validators]
    assert all(rounds[:2] == executed[0][:2] for rounds in executed)


def test_rounds_tell_of_each_job_that_began_ended_and_had_a_fraud_in_it_once(make_net, eventually):
    net = make_net()
    net.workers[0].handler.wrong = {1}
    net.start(rounds=True)
    quiet = net.open()
    net.user.role.close_job(quiet)
    eventually(lambda: all(worker.role.num_free_slots for worker in net.workers))
    cheated = net.open()
    net.work(cheated, range(2))
    executed = net.validators[0].role.rounds.executed

    def told(kind):
        return [job_id for content in list(executed) for job_id in getattr(content, kind)]

    eventually(lambda: set(told("jobs_created")) == {quiet.id, cheated.id})
    eventually(lambda: told("jobs_completed") == [quiet.id])
    eventually(lambda: cheated.id in told("jobs_disputed"))
    number = state_of(net).number
    eventually(lambda: executed[-1].round >= number + 2)
    assert sorted(told("jobs_created")) == sorted([quiet.id, cheated.id])
    assert told("jobs_completed") == [quiet.id]


def test_what_is_told_of_jobs_is_shown_by_who_tells_it(net, eventually):
    booth = Booth(net, eventually)
    job = net.open()
    proposer, voter = booth.proposer.role.rounds.books.news, booth.voter.role.rounds.books.news
    _, content = booth.proposal()
    assert content.jobs_created == (job.id,)
    voter._papers.clear()  # the message with the job has not reached it
    assert voter.unproven(content, []) != []
    assert voter.unproven(content, [booth.proposer.key]) == []
    ended = replace(content, jobs_completed=(job.id,))
    assert "did not close it" in voter.unproven(ended, [booth.proposer.key])[0]
    proposer._closings[job.id] = bytes(64)  # not the author's signature
    assert voter.unproven(ended, [booth.proposer.key]) != []
    unknown = replace(content, jobs_created=(bytes(32),))
    assert "nobody shows its record" in voter.unproven(unknown, [booth.proposer.key])[0]
    voter.note(content)
    assert "was told before" in voter.unproven(content, [booth.proposer.key])[0]
    voter.undo_from(content.round)
    assert voter.unproven(content, []) == []


def test_a_fraud_blacklists_the_worker_and_drops_its_connections(make_net, eventually):
    net = make_net()
    net.start(rounds=True)
    cheat = net.workers[0]
    cheat.handler.wrong = {1}
    job = net.open()
    net.work(job, range(2))
    eventually(lambda: reputation(net, cheat) == 0)
    assert net.user.chain.member(NETWORK, cheat.account).stake_wei == 0
    assert reputation(net, net.workers[1]) >= 1
    eventually(lambda: not any(peer.node_key == cheat.key for v in net.validators for peer in v.node.peers()))
    with pytest.raises(AuthorityError, match="blacklisted"):
        cheat.node.call(net.validators[0].key, "reward_totals", {"root": bytes(32)})
    eventually(lambda: 0 in net.heard.lost)


def test_a_proposer_that_vanishes_is_passed_over(make_net, eventually):
    net = make_net(settings=ValidatorSettings(list_interval_s=0.01, poll_s=0.05, proposer_timeout_s=1.0))
    state = state_of(net)
    first = draw_proposers(net.user.chain.validators(NETWORK), state.number + 1)[0]
    gone = next(validator for validator in net.validators if validator.account == first)
    gone.node.stop()
    net.start(rounds=True, only=[validator for validator in net.validators if validator is not gone])
    eventually(lambda: state_of(net).number >= 1)
    assert net.user.chain.executed_round(NETWORK, 1).view >= 1


def test_a_proposer_that_vanishes_with_a_quorum_in_hand_does_not_stop_the_round(make_net, eventually):
    net = make_net(settings=ValidatorSettings(list_interval_s=0.01, poll_s=0.05, proposer_timeout_s=1.0))
    net.start()
    booth = Booth(net, eventually)
    desk = booth.proposer.role.rounds
    desk._chain.execute_round = lambda *args: None  # it dies before the transaction is sent
    booth.carry()
    desk.ballots._mailer.flush(5.0)
    booth.proposer.node.stop()
    for validator in net.validators:
        if validator is not booth.proposer:
            validator.role.rounds.start()
    eventually(lambda: state_of(net).number >= 1)
    executed = net.user.chain.executed_round(NETWORK, 1)
    assert executed.view == 0  # what the proposer had collected
    assert booth.proposer.account in executed.signers


def test_split_votes_are_resolved_by_the_next_view(make_net, eventually):
    net = make_net(settings=ValidatorSettings(list_interval_s=0.01, poll_s=0.05, proposer_timeout_s=1.0))
    net.start()
    booth = Booth(net, eventually)
    by_account = {validator.account: validator for validator in net.validators}
    first, second, third, fourth = (by_account[account] for account in booth.order)
    motions = []
    for proposer, voters, shift_s in ((first, (first, third), 0), (second, (second, fourth), -1)):
        desk = proposer.role.rounds
        view = booth.order.index(proposer.account)  # of view 1 the second is the leader
        candidate = desk._propose(booth.state, view, 4)
        content = replace(candidate.content, until_s=candidate.content.until_s + shift_s)
        proposal = msgspec.structs.replace(candidate.proposal, content=content.encode())
        for validator in net.validators:
            box = validator.role.rounds.ballots.box(booth.state)
            motion = box.add_motion(proposal, content)
            for voter in voters:
                vote = sign_digest(voter.account_key, net.model.domain.digest(content))
                validator.role.rounds.ballots.add_signature(box, motion, view, vote)
        motions.append(motion)
    assert {len(box.ballots_for(motion)) for motion in motions} == {2}
    for validator in net.validators:
        validator.role.rounds.start()
    eventually(lambda: state_of(net).number >= 1)
    executed = net.user.chain.executed_round(NETWORK, 1)
    leading = min(motions, key=lambda motion: motion.id)
    assert executed.digest == net.model.domain.digest(in_view(leading.content, executed.view))


def test_validators_that_cannot_justify_the_same_come_to_terms(make_net, eventually):
    """Half of them hold records that the others cannot check: what all can justify is executed in the end."""
    net = make_net(settings=ValidatorSettings(list_interval_s=0.01, poll_s=0.05, proposer_timeout_s=0.3))
    net.start()
    job = net.open()
    net.work(job, range(3))
    eventually(lambda: net.everyone_has(12, job))
    for validator in net.validators[2:]:
        del validator.role.audits.jobs[job.id]  # as after a restart
    for validator in net.validators:
        validator.role.rounds.start()
    eventually(lambda: state_of(net).number >= 2)


def test_a_validator_that_has_seen_more_votes_for_another_proposal_says_so(net, audited, eventually):
    booth = Booth(net, eventually)
    proposal, _ = booth.proposal()
    assert booth.vote(proposal).signature
    by_account = {validator.account: validator for validator in net.validators}
    voter = by_account[booth.order[2]]
    assert booth.vote(proposal, voter=voter).signature  # so that it knows of the first
    rival = by_account[booth.order[1]].role.rounds
    eventually(lambda: rival._clock.at(state_of(net)).number >= 1)
    candidate = rival._propose(booth.state, 1, 4)
    other = replace(candidate.content, until_s=candidate.content.until_s + 1)
    named = msgspec.structs.replace(candidate.proposal, content=other.encode())
    signed = [
        (1).to_bytes(4, "big") + sign_digest(by_account[booth.order[1]].account_key, net.model.domain.digest(other))
    ]
    vote = booth.vote(named, ballots=signed, voter=voter)
    assert "has more votes" in vote.reasons[0]


def test_rounds_go_on_when_a_chain_that_was_away_comes_back(make_net, eventually, monkeypatch):
    net = make_net()
    net.start(rounds=True)
    eventually(lambda: state_of(net).number >= 1)
    asked, is_away = [], [True]

    def away(real):
        def method(self, *args):
            if is_away[0]:
                asked.append(self)
                raise ChainUnreachableError("away")
            return real(self, *args)

        return method

    for name in ("round_state", "members", "validators", "execute_round", "executed_round", "endorse_round"):
        monkeypatch.setattr(MemoryChain, name, away(getattr(MemoryChain, name)))
    eventually(lambda: all(asked.count(validator.chain) > 5 for validator in net.validators))
    is_away[0] = False
    number = state_of(net).number
    eventually(lambda: state_of(net).number >= number + 2)
    assert all(validator.role.rounds.proofs.accused == set() for validator in net.validators)


def test_rounds_go_on_with_nothing_to_carry(make_net, eventually):
    net = make_net()
    net.start(rounds=True)
    eventually(lambda: state_of(net).number >= 2)


def test_a_validator_that_missed_a_round_learns_what_it_settled(net, audited, eventually):
    booth = Booth(net, eventually)
    away = booth.voter
    others = [v for v in net.validators if v is not away]
    desk = booth.proposer.role.rounds
    collector = desk._collector
    asked = collector._ask
    collector._ask = lambda account, *rest: None if account == away.account else asked(account, *rest)
    booth.carry()
    after = state_of(net)
    assert after.number == 1
    for validator in (booth.proposer, *(v for v in others if v is not booth.proposer)):
        validator.role.rounds.books.follow(after)
    before = len(away.role.rounds.books.records.unsettled()[0])
    away.role.rounds.books.follow(after)
    assert before == 12
    assert away.role.rounds.books.records.unsettled() == ({}, {})
    assert away.role.rounds.books.rewards.knows(after)


def test_who_asks_for_an_executed_round_is_not_held_up_by_validators_that_hang(net, audited, eventually, monkeypatch):
    booth = Booth(net, eventually)
    booth.carry()
    after = state_of(net)
    booth.proposer.role.rounds.books.follow(after)
    node, over = booth.voter.node, threading.Event()
    call = node.call

    def slow(validator, *args, **options):
        if validator != booth.proposer.key:
            over.wait(60)
        return call(validator, *args, **options)

    monkeypatch.setattr(node, "call", slow)
    books = booth.voter.role.rounds.books
    books._candidates.clear()  # as after a restart
    began_s = time.monotonic()
    books.follow(after)
    assert time.monotonic() - began_s < 40
    assert books.executed[-1].round == 1
    over.set()


def test_a_validator_that_restarts_gets_the_reward_totals_from_the_others(net, audited, eventually):
    booth = Booth(net, eventually)
    booth.carry()
    after = state_of(net)
    assert after.number == 1
    assert any(after.latest_root) is True
    for validator in net.validators:
        validator.role.rounds.books.follow(after)
    old = booth.voter
    net.everybody.remove(old)
    old.stop()
    number = net.validators.index(old) + 1
    again = net.citizen(number, "validator")
    net.validators[net.validators.index(old)] = again
    net.meet()
    net.make_validator(again)
    books = again.role.rounds.books
    books.follow(after)
    assert books.rewards.knows(after)
    assert books.rewards.totals_wei == booth.proposer.role.rounds.books.rewards.totals_wei


# -- what is not signed -----------------------------------------------------------------------------------------------


def test_an_honest_proposal_is_signed(net, audited, eventually):
    booth = Booth(net, eventually)
    vote = booth.vote(booth.proposal()[0])
    assert vote.reasons == []
    assert len(vote.signature) == 65


def test_a_second_proposal_in_one_view_is_not_signed(net, audited, eventually):
    booth = Booth(net, eventually)
    proposal, content = booth.proposal()
    assert booth.vote(proposal).signature
    assert booth.vote(proposal).signature  # the same again is fine
    own = booth.proposer.role.rounds.books
    later = replace(booth.state, chain_time_s=booth.state.chain_time_s + 1)
    eventually(lambda: time.time() > later.chain_time_s)
    other, _ = propose(
        own.context(booth.state, 0, later.chain_time_s, 4), own.records.evidence(booth.state, *own.records.unsettled())
    )
    assert other != content
    assert not booth.vote(proposal, other).signature
    assert booth.proposer.account in booth.voter.role.rounds.proofs.accused


def test_what_the_evidence_does_not_justify_is_not_signed_and_the_reasons_say_why(net, audited, eventually):
    booth = Booth(net, eventually)
    proposal, content = booth.proposal()
    change = msgspec.structs.replace
    unknown = change(proposal, verdicts=[*proposal.verdicts, bytes([9] * 32)])
    early = next(
        digest
        for digest, commitment in net.audited(booth.voter, audited).commitments.items()
        if digest not in proposal.settled
    )
    in_window = change(proposal, settled=[*proposal.settled, early])
    left_out = change(proposal, settled=proposal.settled[1:])
    cases = [
        ("allotment_wei", proposal, replace(content, allotment_wei=content.allotment_wei + 1)),
        ("rewards_root", proposal, replace(content, rewards_root=bytes(32))),
        ("reputations: member", proposal, replace(content, reputations=b"")),
        ("evidence_root", proposal, replace(content, evidence_root=evidence_root([]))),
        ("in the future", proposal, replace(content, until_s=int(time.time()) + 600)),
        ("before the last", proposal, replace(content, until_s=1)),
        ("1 verdicts or proofs are not known", unknown, content),
        ("audit window is open", in_window, content),
        ("rewards_root", left_out, content),
    ]
    for complaint, named, told in cases:
        candidate, reasons = booth.judge(named, told)
        assert candidate is None, complaint
        assert complaint in "; ".join(reasons)
    assert booth.vote(proposal).signature


def test_a_proposer_cannot_have_work_settled_for_less_than_an_intervals_emission(net, audited, eventually):
    booth = Booth(net, eventually)
    desk = booth.proposer.role.rounds
    early_s = booth.state.emitted_until_s
    booth.state = replace(booth.state, earliest_at_s=early_s + 600, chain_time_s=early_s + 600)
    books, records = desk.books, desk.books.records
    poor, _ = propose(books.context(booth.state, 0, early_s, 4), records.evidence(booth.state, *records.unsettled()))
    assert poor.allotment_wei == 0
    proposal, _ = booth.proposal()
    named = msgspec.structs.replace(proposal, content=poor.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: early_s + 1.0)
        assert booth.judge(named, poor)[1] == []  # clocks may be behind the chain's
        patch.setattr(time, "time", lambda: early_s + 600.0)
        assert "before the round was due" in booth.judge(named, poor)[1][0]


def test_a_proposal_of_another_place_is_not_signed(net, audited, eventually):
    booth = Booth(net, eventually)
    proposal, content = booth.proposal()
    change = msgspec.structs.replace
    cases = [
        ("not those of the proposal", proposal, replace(content, view=1)),
        ("not those of the proposal", proposal, replace(content, round=7)),
        ("previous_hash", proposal, replace(content, previous_hash=b"\1" * 32)),
        ("not this proposer's", change(proposal, view=1), replace(content, view=1)),
        ("is not due", change(proposal, view=400), replace(content, view=400)),
    ]
    for complaint, named, told in cases:
        vote = booth.vote(named, told)
        assert not vote.signature, complaint
        assert complaint in "; ".join(vote.reasons)
    assert booth.vote(proposal).signature


def test_a_proposal_shows_its_proposers_own_vote_whoever_passes_it_on(net, audited, eventually):
    booth = Booth(net, eventually)
    proposal, content = booth.proposal()
    stranger = next(v for v in net.validators if v not in (booth.proposer, booth.voter))
    vote = booth.vote(proposal, ballots=booth.sign(content, stranger))
    assert "not this proposer's" in vote.reasons[0]
    passed_on = {"ballots": booth.sign(content)}
    reply = stranger.node.call(booth.voter.key, "propose", passed_on, [proposal.encode()])
    assert Vote.decode(reply.body).signature


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"x" * 100])
def test_bytes_that_are_no_proposal_are_a_record_error(net, data):
    with pytest.raises(RecordError):
        net.validators[0].node.call(net.validators[1].key, "propose", {"ballots": []}, [data])


def test_content_that_is_no_proposal_is_a_record_error(net, audited, eventually):
    booth = Booth(net, eventually)
    proposal, content = booth.proposal()
    for data in (b"", b"x" * 64, content.encode() + bytes(32)):
        bad = msgspec.structs.replace(proposal, content=data)
        with pytest.raises(RecordError):
            booth.proposer.node.call(booth.voter.key, "propose", {"ballots": []}, [bad.encode()])


def test_other_records_named_for_the_same_content_do_not_spoil_it(net, audited, eventually):
    booth = Booth(net, eventually)
    proposal, content = booth.proposal()
    assert proposal.verdicts
    swapped = msgspec.structs.replace(proposal, verdicts=[], settled=sorted([*proposal.verdicts, *proposal.settled]))
    stranger = next(v for v in net.validators if v not in (booth.proposer, booth.voter))
    shown = {"ballots": booth.sign(content)}  # the proposer's own vote, which whoever has it can pass on
    spoilt = Vote.decode(stranger.node.call(booth.voter.key, "propose", shown, [swapped.encode()]).body)
    assert not spoilt.signature
    assert booth.vote(proposal).signature
    box = booth.voter.role.rounds.ballots.box(booth.state)
    assert box.motions[0].proposal.verdicts == proposal.verdicts


def test_records_are_settled_once(net, audited, eventually):
    booth = Booth(net, eventually)
    first, _ = booth.proposal()
    booth.carry()
    for validator in net.validators:
        validator.role.rounds.books.follow(state_of(net))
    again = Booth(net, eventually)
    proposal, content = again.proposal()
    assert proposal.verdicts == proposal.settled == []
    for named in ({"verdicts": first.verdicts[:1]}, {"settled": first.settled[:1]}):
        _, reasons = again.judge(msgspec.structs.replace(proposal, **named), content)
        assert "settled in a round before" in reasons[0]


def test_a_fraud_that_is_left_out_is_not_signed_for(net, eventually):
    net.workers[0].handler.wrong = {1}
    job = net.open()
    net.work(job, range(2))
    eventually(lambda: net.everyone_has(8, job))
    eventually(
        lambda: all(
            sum(v.finding == "fraudulent" for v, _ in net.audited(n, job).verdicts.values()) == 2
            and len(net.audited(n, job).confirmed) >= 2
            for n in net.validators
        )
    )
    booth = Booth(net, eventually)
    proposal, _ = booth.proposal()
    frauds = {d for d, (v, _) in net.audited(booth.voter, job).verdicts.items() if v.finding == "fraudulent"}
    assert frauds <= set(proposal.verdicts)
    audited = net.audited(booth.voter, job)
    for digest in frauds:
        audited.confirmed[digest] = time.monotonic() - 1000
    without = msgspec.structs.replace(proposal, verdicts=[d for d in proposal.verdicts if d not in frauds])
    vote = booth.vote(without)
    assert not vote.signature
    assert sum("is left out" in reason for reason in vote.reasons) == 2


def test_work_that_is_passed_over_for_an_interval_is_not_signed_for_while_views_are_early(net, audited, eventually):
    booth = Booth(net, eventually)
    own = booth.proposer.role.rounds.books.records
    verdicts, commitments = own.unsettled()
    passed_over = next(iter(commitments))
    own.unsettled = lambda: (verdicts, {each: c for each, c in commitments.items() if each != passed_over})
    proposal, content = booth.proposal()
    records = booth.voter.role.rounds.books.records
    assert records.since().keys() == {*verdicts, *commitments}
    assert booth.judge(proposal, content)[1] == []  # the proposer may not have heard of it yet
    records._since_s[passed_over] -= booth.state.interval_s + 1
    candidate, reasons = booth.judge(proposal, content)
    assert candidate is None
    assert reasons == [f"{passed_over.hex()[:16]} is left out: it could be settled an interval ago"]
    candidate, reasons = booth.judge(proposal, in_view(content, COMPLETE_VIEWS))
    assert reasons == []
    assert candidate is not None


def test_a_proposal_that_is_full_may_leave_out_what_it_has_no_room_for(net, audited, eventually, monkeypatch):
    booth = Booth(net, eventually)
    records = booth.voter.role.rounds.books.records
    for digest in records.since():
        records._since_s[digest] -= booth.state.interval_s + 1
    monkeypatch.setattr("smartnodes_core.nodes.settleable.MAX_NAMED", 3)
    proposal, content = booth.proposal()
    assert len(proposal.verdicts) == 3
    assert booth.judge(proposal, content)[1] == []


def test_a_verdict_that_a_message_did_not_bring_is_fetched_for_the_vote(net, audited, eventually):
    booth = Booth(net, eventually)
    proposal, _ = booth.proposal()
    held = net.audited(booth.voter, audited)
    lost = next(digest for digest in proposal.verdicts)
    verdict, _ = held.verdicts.pop(lost)
    del held.by_unit[(verdict.commitment, verdict.tier, verdict.unit)]
    assert booth.vote(proposal).signature
    assert lost in held.verdicts


def test_a_validator_signs_one_proposal_of_a_round_and_view_also_after_a_restart(net, audited, eventually, tmp_path):
    booth = Booth(net, eventually)
    _, content = booth.proposal()
    other = replace(content, allotment_wei=1)
    chain = net.user.chain
    journal = Journal(tmp_path / "journal")
    Signer(bytes([3] * 32), journal).sign(content, chain.proposal_digest(content))
    journal.close()
    signer = Signer(bytes([3] * 32), Journal(tmp_path / "journal"))
    with pytest.raises(EquivocationError):
        signer.sign(other, chain.proposal_digest(other))
    signer.sign(replace(other, view=1), chain.proposal_digest(replace(other, view=1)))


def test_views_follow_each_other_by_the_chains_clock(net):
    clock = ViewClock(10.0)
    state = state_of(net)
    assert clock.at(replace(state, chain_time_s=state.earliest_at_s - 1)) is None
    views = [clock.at(replace(state, chain_time_s=state.earliest_at_s + s)) for s in (0, 9, 10, 45)]
    assert [(view.number, round(view.passed, 2)) for view in views] == [(0, 0.0), (0, 0.9), (1, 0.0), (4, 0.5)]


def test_a_validator_that_waits_for_a_round_looks_at_the_chain_once(net, eventually, monkeypatch):
    desk = net.validators[0].role.rounds
    state = state_of(net)
    later = replace(state, earliest_at_s=state.chain_time_s + 30)
    calls = []

    class Counting:
        def __getattr__(self, name):
            calls.append(name)
            return lambda *args: later

    monkeypatch.setattr(desk, "_chain", Counting())
    desk.books._number = later.number
    assert 29 <= desk._tick() <= 30
    assert calls == ["round_state"]


def test_a_round_that_nobody_keeps_is_told_so(net):
    with pytest.raises(RecordError, match="no such round"):
        net.validators[0].node.call(net.validators[1].key, "executed_proposal", {"digest": bytes(32)})


def test_votes_that_one_validator_sends_early_do_not_crowd_out_anothers(net, eventually):
    desk = net.validators[0].role.rounds.ballots
    floods, other = (SimpleNamespace(node_key=validator.key) for validator in net.validators[1:3])
    place = {"round": 1, "previous": bytes(32), "view": 0}
    vote = {"content": b"c" * 32, "signature": sign_digest(net.validators[2].account_key, b"d" * 32)}
    desk.rpc_ballot(other, {**place, **vote}, memoryview(b""))
    for number in range(2000):
        desk.rpc_ballot(floods, {**place, **vote, "round": number + 2}, memoryview(b""))
    held = [each.number for of_one in desk._early.values() for each in of_one]
    assert held.count(1) == 1
    assert len(held) == 1 + MAX_EARLY


def test_proposals_signed_in_many_views_are_not_all_remembered(net, audited, eventually, monkeypatch):
    monkeypatch.setattr("smartnodes_core.nodes.round_books.MAX_CANDIDATES", 3)
    booth = Booth(net, eventually)
    desk = booth.proposer.role.rounds
    for view in range(10):
        candidate = desk._propose(booth.state, view, 4)
        desk.books.remember(net.model.domain.digest(candidate.content), candidate)
    assert [each.content.view for each in desk.books._candidates.values()] == [7, 8, 9]


def test_parameters_change_when_a_quorum_wants_the_same(make_net, eventually):
    wanted = Parameters(100, 20_000)
    net = make_net(settings=replace(FAST, parameters=wanted))
    net.make_validator(net.validators[0], FAST)  # this one wants nothing else than what is
    net.start(rounds=True)
    before = net.user.chain.parameters(NETWORK)
    eventually(lambda: net.user.chain.parameters(NETWORK) == wanted)
    executed = net.validators[1].role.rounds.executed
    eventually(lambda: any(content.parameters for content in executed))
    changed = [content for content in executed if content.parameters]
    assert changed[0].parameters == (wanted,)
    assert before != wanted
    number = state_of(net).number
    eventually(lambda: state_of(net).number >= number + 2)
    assert sum(bool(content.parameters) for content in executed) == 1


def test_parameters_that_one_validator_wants_alone_change_nothing(net, audited, eventually):
    booth = Booth(net, eventually)
    booth.proposer.role.rounds.books.wanted = Parameters(0, 0)
    proposal, content = booth.proposal()
    assert content.parameters == (Parameters(0, 0),)
    assert "parameters: " in booth.vote(proposal).reasons[0]
