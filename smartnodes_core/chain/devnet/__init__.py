"""The embedded chain: an EVM behind JSON-RPC on loopback, for networks on one machine and for tests.

`accounts` its funded keys · `evm` executes one transaction on the state in `nodes` · `journal` what survives a kill ·
`archive` checkpoints, so that a start need not execute all of it · `history` blocks and receipts · `ledger` puts them
together and keeps the time · `methods` the JSON-RPC methods · `server` HTTP · `launcher` starts one as a process ·
`anvil` another program in its place · `python -m smartnodes_core.chain.devnet` runs one. Light to import: py-evm is
loaded by `evm` only.
"""

CHAIN_ID = 31337
