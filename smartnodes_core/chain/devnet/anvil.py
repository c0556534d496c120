"""Foundry's `anvil` in the place of the embedded chain, where it is on the PATH: ten times as fast, nothing on disk.

Same chain id and same funded accounts. It makes a block for each transaction and one each second, so that calls, which
see the time of the last block, see the present.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from types import TracebackType
from typing import Any

from smartnodes_core.chain.devnet import CHAIN_ID
from smartnodes_core.chain.devnet.accounts import FUNDS_WEI, devnet_accounts
from smartnodes_core.chain.devnet.launcher import START_DEADLINE_S, STOP_DEADLINE_S, DevnetProcess
from smartnodes_core.errors import ChainError

#: Ends what it started when its standard input is closed: so does the kernel when its starter is killed.
_WITH_STARTER = 'exec 3<&0; "$@" </dev/null >/dev/null 2>&1 & pid=$!; (read _ <&3; kill $pid) & wait $pid'


class AnvilProcess:
    """A running anvil: `url` is where it listens. A context manager; `stop` is safe to call twice. Raises ChainError
    where it does not come up before the deadline.
    """

    def __init__(self, program: str, deadline_s: float = START_DEADLINE_S):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        blocks = ["--block-time", "1", "--mixed-mining", "--gas-limit", "30000000"]
        command = [program, "--silent", "--port", str(port), "--chain-id", str(CHAIN_ID), "--accounts", "1", *blocks]
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", _WITH_STARTER, "sh", *command], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self._wait(time.monotonic() + deadline_s)
            for account in devnet_accounts():
                self._rpc("anvil_setBalance", "0x" + account.hex(), hex(FUNDS_WEI))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the process: politely, then not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
                try:
                    self.process.wait(STOP_DEADLINE_S)
                except subprocess.TimeoutExpired:
                    continue
        if self.process.stdin is not None:
            self.process.stdin.close()

    def __enter__(self) -> AnvilProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _wait(self, deadline: float) -> None:
        while True:
            try:
                self._rpc("eth_chainId")
                return
            except (OSError, urllib.error.URLError) as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise ChainError(f"anvil does not answer at {self.url} ({error}): does it run by hand?") from None
                time.sleep(0.02)

    def _rpc(self, method: str, *params: Any) -> Any:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=STOP_DEADLINE_S) as reply:
            answer = json.load(reply)
        if "error" in answer:
            raise ChainError(f"anvil refused {method}: {answer['error']}: is it of version 1 or later?")
        return answer["result"]


def start_chain() -> AnvilProcess | DevnetProcess:
    """A chain of this machine that is forgotten when it is stopped: anvil, or else the embedded one."""
    program = shutil.which("anvil")
    return AnvilProcess(program) if program else DevnetProcess()
