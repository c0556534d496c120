"""The embedded chain as a process: what it answers, what it survives, how it ends."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from smartnodes_core.chain.devnet.accounts import devnet_accounts, devnet_key, is_devnet_key
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.signing import checksum, new_key
from smartnodes_core.errors import ChainError, PortInUseError

from .conftest import SETTINGS, dies_with_its_starter, rpc

SENDER = "0x" + devnet_accounts()[20].hex()
RECEIVER = "0x" + "ab" * 20


def payment(nonce: int, value: int = 1, **changes: Any) -> str:
    from eth_account import Account

    fields = {
        "nonce": nonce,
        "to": checksum(bytes.fromhex(RECEIVER[2:])),
        "value": value,
        "gas": 21000,
        "maxFeePerGas": 2 * 10**9,
        "maxPriorityFeePerGas": 0,
        "chainId": 31337,
    }
    return "0x" + Account.sign_transaction(fields | changes, devnet_key(20)).raw_transaction.hex()


def balance(url: str) -> int:
    return int(rpc(url, "eth_getBalance", RECEIVER, "latest"), 16)


def test_a_transaction_is_in_a_block_of_its_own_at_once(devnet: DevnetProcess) -> None:
    nonce = int(rpc(devnet.url, "eth_getTransactionCount", SENDER, "latest"), 16)
    number = int(rpc(devnet.url, "eth_blockNumber"), 16)
    before = balance(devnet.url)
    transaction = rpc(devnet.url, "eth_sendRawTransaction", payment(nonce, 7))
    receipt = rpc(devnet.url, "eth_getTransactionReceipt", transaction)
    assert (receipt["status"], int(receipt["blockNumber"], 16), receipt["gasUsed"]) == ("0x1", number + 1, hex(21000))
    assert balance(devnet.url) == before + 7
    block = rpc(devnet.url, "eth_getBlockByNumber", hex(number + 1), True)
    assert block["transactions"][0]["hash"] == transaction
    assert block["parentHash"] == rpc(devnet.url, "eth_getBlockByNumber", hex(number), False)["hash"]
    assert rpc(devnet.url, "eth_getTransactionReceipt", "0x" + "00" * 32) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonce": 10**6}, "nonce too high"),
        ({"chainId": 1}, "invalid chain id"),
        ({"gas": 20000}, "intrinsic gas"),
        ({"maxFeePerGas": 1, "maxPriorityFeePerGas": 0}, "base fee"),
        ({"value": 10**30}, "insufficient funds"),
    ],
)
def test_a_transaction_that_cannot_be_is_refused_with_the_reason(
    devnet: DevnetProcess, changes: dict[str, int], message: str
) -> None:
    nonce = int(rpc(devnet.url, "eth_getTransactionCount", SENDER, "latest"), 16)
    with pytest.raises(AssertionError, match=message):
        rpc(devnet.url, "eth_sendRawTransaction", payment(**({"nonce": nonce} | changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("eth_getBalance", ["0x12", "latest"]),
        ("eth_getBalance", [None, "latest"]),
        ("eth_sendRawTransaction", ["0x" + "ff" * 50]),
        ("eth_sendRawTransaction", ["0x" + "c0" * 5]),
        ("eth_sendRawTransaction", [17]),
        ("eth_call", ["nothing", "latest"]),
        ("eth_getLogs", [[]]),
        ("eth_getBlockByNumber", [{}, False]),
        ("eth_feeHistory", ["x"]),
        ("evm_increaseTime", [-5]),
        ("no_such_method", []),
        ("eth_chainId", {"a": 1}),
    ],
)
def test_malformed_requests_are_answered_with_errors(devnet: DevnetProcess, method: str, params: Any) -> None:
    body = json.dumps({"jsonrpc": "2.0", "id": 5, "method": method, "params": params}).encode()
    with urllib.request.urlopen(devnet.url, body, timeout=10) as reply:
        answer = json.load(reply)
    assert answer["id"] == 5
    assert "internal error" not in answer["error"]["message"]


def test_a_batch_is_answered_in_order(devnet: DevnetProcess) -> None:
    batch = [{"jsonrpc": "2.0", "id": i, "method": "eth_chainId"} for i in range(3)] + [7]
    with urllib.request.urlopen(devnet.url, json.dumps(batch).encode(), timeout=10) as reply:
        answers = json.load(reply)
    assert [answer.get("result") for answer in answers] == ["0x7a69"] * 3 + [None]
    assert answers[3]["error"]["code"] == -32600


def test_bodies_over_the_cap_and_requests_of_web_pages_are_refused(devnet: DevnetProcess) -> None:
    huge = urllib.request.Request(devnet.url, b"{}", {"Content-Length": str(1 << 40)})
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(huge, timeout=10)
    page = urllib.request.Request(devnet.url, b"{}", {"Origin": "http://example.org"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(page, timeout=10)


def test_calls_see_the_present_second_and_time_moves_on_request() -> None:
    with DevnetProcess() as process:
        rpc(process.url, "evm_mine")
        first = rpc(process.url, "eth_getBlockByNumber", "latest", False)
        rpc(process.url, "evm_increaseTime", 1000)
        # runtime code: TIMESTAMP PUSH0 MSTORE PUSH1 32 PUSH0 RETURN, run as creation code
        seen = int(rpc(process.url, "eth_call", {"data": "0x425f5260205ff3"}, "latest"), 16)
        assert 1000 <= seen - int(first["timestamp"], 16) <= 1010


def test_history_survives_kill_minus_nine(tmp_path: Path) -> None:
    journal = tmp_path / "devnet.journal"
    with DevnetProcess(journal=journal) as process:
        for nonce in range(5):
            rpc(process.url, "eth_sendRawTransaction", payment(nonce))
        rpc(process.url, "evm_increaseTime", 500)
        rpc(process.url, "evm_mine")
        head = rpc(process.url, "eth_getBlockByNumber", "latest", False)
        process.process.send_signal(signal.SIGKILL)
        process.process.wait(10)
    with DevnetProcess(journal=journal) as process:
        assert rpc(process.url, "eth_getBlockByNumber", "latest", False) == head
        assert balance(process.url) == 5
        rpc(process.url, "eth_sendRawTransaction", payment(5))
        assert balance(process.url) == 6


@pytest.mark.parametrize("torn", [1, 7, 20])
def test_a_torn_tail_is_cut_off_and_the_rest_kept(tmp_path: Path, torn: int) -> None:
    journal = tmp_path / "devnet.journal"
    with DevnetProcess(journal=journal) as process:
        for nonce in range(3):
            rpc(process.url, "eth_sendRawTransaction", payment(nonce))
    with open(journal, "r+b") as file:
        file.truncate(journal.stat().st_size - torn)
    with DevnetProcess(journal=journal) as process:
        assert balance(process.url) == 2
        rpc(process.url, "eth_sendRawTransaction", payment(2))
    with DevnetProcess(journal=journal) as process:
        assert balance(process.url) == 3


def test_two_devnets_never_share_a_journal(tmp_path: Path) -> None:
    journal = tmp_path / "devnet.journal"
    with DevnetProcess(journal=journal), pytest.raises(ChainError, match="another devnet"):
        DevnetProcess(journal=journal)


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "letter.txt"
    other.write_text("dear reader, this is not a journal of any kind")
    with pytest.raises(ChainError, match="not a devnet journal"):
        DevnetProcess(journal=other)
    assert other.read_text().startswith("dear reader")


def test_a_port_in_use_is_named(devnet: DevnetProcess) -> None:
    port = int(devnet.url.rsplit(":", 1)[1])
    with pytest.raises(PortInUseError, match=f"port {port} .*choose another"):
        DevnetProcess(port=port)


def test_sigterm_ends_it_cleanly() -> None:
    with DevnetProcess() as process:
        process.process.terminate()
        assert process.process.wait(5) == 0


def test_it_ends_when_its_starter_dies() -> None:
    assert dies_with_its_starter("DevnetProcess()")


def test_its_keys_are_known_and_funded(devnet: DevnetProcess) -> None:
    assert int(rpc(devnet.url, "eth_getBalance", "0x" + devnet_accounts()[60].hex(), "latest"), 16) == 10**24
    assert is_devnet_key(devnet_key(63))
    assert not is_devnet_key(new_key())
    assert set(SETTINGS.genesis) <= set(devnet_accounts())
    with pytest.raises(IndexError):
        devnet_key(64)
