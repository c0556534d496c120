"""The rules of the four contracts in plain Python: what `memory.MemoryChain` runs on, and what tests compare the
contracts with.

`state` what is kept · `members` who takes part · `rewards` what is allotted and claimed · `rounds` how a quorum changes
all of it. One `ChainModel` is one deployment, shared by the views of all accounts. Not for money: there is no gas and
no proof of anything.
"""

from smartnodes_core.chain.model.rounds import ChainModel
from smartnodes_core.chain.model.state import CHAIN_ID, COINS_WEI, ESCROW, REGISTRY, ROUNDS, SILENCE_S, VAULTS

__all__ = ["CHAIN_ID", "COINS_WEI", "ESCROW", "REGISTRY", "ROUNDS", "SILENCE_S", "VAULTS", "ChainModel"]
