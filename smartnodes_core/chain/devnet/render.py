"""Blocks, transactions, receipts and logs as the JSON that Ethereum clients expect."""

from __future__ import annotations

from typing import Any

from smartnodes_core.chain.devnet.evm import BASE_FEE_WEI, BLOCK_GAS_LIMIT, Log
from smartnodes_core.chain.devnet.history import Block, Mined

_NO_BLOOM = "0x" + "00" * 256
_NO_HASH = "0x" + "00" * 32
_NOBODY = "0x" + "00" * 20


def data(value: bytes) -> str:
    return "0x" + value.hex()


def block(item: Block, full: bool) -> dict[str, Any]:
    """`full` gives whole transactions instead of their hashes. Blooms are left empty: logs are found without."""
    mined = item.mined
    transactions = [] if mined is None else [transaction(mined, item) if full else data(mined.hash)]
    return {
        "number": hex(item.number),
        "hash": data(item.hash),
        "parentHash": data(item.parent_hash),
        "timestamp": hex(item.timestamp_s),
        "stateRoot": data(item.state_root),
        "gasLimit": hex(BLOCK_GAS_LIMIT),
        "gasUsed": hex(mined.outcome.gas_used if mined else 0),
        "baseFeePerGas": hex(BASE_FEE_WEI),
        "transactions": transactions,
        "uncles": [],
        "miner": _NOBODY,
        "nonce": "0x" + "00" * 8,
        "difficulty": "0x0",
        "totalDifficulty": "0x0",
        "extraData": "0x",
        "mixHash": _NO_HASH,
        "sha3Uncles": _NO_HASH,
        "transactionsRoot": _NO_HASH,
        "receiptsRoot": _NO_HASH,
        "logsBloom": _NO_BLOOM,
        "size": "0x0",
    }


def transaction(mined: Mined, item: Block) -> dict[str, Any]:
    sent = mined.transaction
    type_id = sent.type_id or 0
    shown = {
        "hash": data(mined.hash),
        "type": hex(type_id),
        "chainId": hex(sent.chain_id),
        "nonce": hex(sent.nonce),
        "from": data(bytes(sent.sender)),
        "to": data(bytes(sent.to)) if sent.to else None,
        "value": hex(sent.value),
        "gas": hex(sent.gas),
        "gasPrice": hex(_gas_price(sent)),
        "input": data(bytes(sent.data)),
        "r": hex(sent.r),
        "s": hex(sent.s),
        "v": hex(sent.y_parity),
        "blockHash": data(item.hash),
        "blockNumber": hex(item.number),
        "transactionIndex": "0x0",
    }
    if type_id == 2:
        shown["maxFeePerGas"] = hex(sent.max_fee_per_gas)
        shown["maxPriorityFeePerGas"] = hex(sent.max_priority_fee_per_gas)
    return shown


def receipt(mined: Mined, item: Block) -> dict[str, Any]:
    sent, outcome = mined.transaction, mined.outcome
    return {
        "transactionHash": data(mined.hash),
        "transactionIndex": "0x0",
        "blockHash": data(item.hash),
        "blockNumber": hex(item.number),
        "from": data(bytes(sent.sender)),
        "to": data(bytes(sent.to)) if sent.to else None,
        "type": hex(sent.type_id or 0),
        "status": hex(int(outcome.ok)),
        "gasUsed": hex(outcome.gas_used),
        "cumulativeGasUsed": hex(outcome.gas_used),
        "effectiveGasPrice": hex(_gas_price(sent)),
        "contractAddress": data(outcome.contract) if outcome.contract else None,
        "logs": [log(entry, i, mined, item) for i, entry in enumerate(outcome.logs)],
        "logsBloom": _NO_BLOOM,
    }


def log(entry: Log, index: int, mined: Mined, item: Block) -> dict[str, Any]:
    return {
        "address": data(entry.address),
        "topics": [data(topic) for topic in entry.topics],
        "data": data(entry.data),
        "logIndex": hex(index),
        "transactionHash": data(mined.hash),
        "transactionIndex": "0x0",
        "blockHash": data(item.hash),
        "blockNumber": hex(item.number),
        "removed": False,
    }


def _gas_price(sent: Any) -> int:
    return int(min(sent.max_fee_per_gas, BASE_FEE_WEI + sent.max_priority_fee_per_gas))
