"""What a relay gives away: circuits, bytes and bytes per second, counted for the peer that asked for a circuit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from smartnodes_core.errors import BusyError

#: So much of a second's bytes is saved up at most.
_BURST_S = 0.1
MAX_ACCOUNTS = 10_000


@dataclass(frozen=True)
class RelayQuotas:
    """Both directions of a circuit count. `peer_bytes` are per `window_s`; a circuit has `wait_s` to be joined from
    both sides and ends after `idle_s` without a byte; `num_unjoined` connections, and
    `unjoined_per_host` from one address, may have shown no token yet.
    """

    num_circuits: int = 64
    circuits_per_peer: int = 4
    peer_bytes: int = 64 << 30
    window_s: float = 3600.0
    peer_bytes_per_s: int = 25 << 20
    wait_s: float = 10.0
    idle_s: float = 120.0
    num_unjoined: int = 256
    unjoined_per_host: int = 16


@dataclass
class _Account:
    """What one peer has used."""

    window_from_s: float
    credited_at_s: float
    num_circuits: int = 0
    num_bytes: int = 0
    credit_bytes: float = field(default=0.0)


class RelayAccounts:
    """Every peer's use. Thread-safe; `now_s` is a monotonic clock."""

    def __init__(self, quotas: RelayQuotas, now_s: Callable[[], float] = time.monotonic) -> None:
        self.quotas, self._now_s = quotas, now_s
        self._lock = threading.Lock()
        self._accounts: dict[bytes, _Account] = {}
        self.num_circuits = 0
        self.num_bytes = 0

    def open_circuit(self, owner: bytes) -> None:
        """Counts one more circuit. Raises BusyError over a quota."""
        with self._lock:
            account = self._of(owner)
            if self.num_circuits >= self.quotas.num_circuits or account.num_circuits >= self.quotas.circuits_per_peer:
                raise BusyError(
                    f"{account.num_circuits} of your circuits and {self.num_circuits} in all are open at this relay, "
                    f"at most {self.quotas.circuits_per_peer} and {self.quotas.num_circuits}: try another, or later"
                )
            if account.num_bytes >= self.quotas.peer_bytes:
                left_s = self.quotas.window_s - (self._now_s() - account.window_from_s)
                raise BusyError(f"{account.num_bytes} bytes were relayed for you: more in {left_s:.0f} s")
            account.num_circuits += 1
            self.num_circuits += 1

    def close_circuit(self, owner: bytes) -> None:
        with self._lock:
            self._of(owner).num_circuits -= 1
            self.num_circuits -= 1

    def allowed_bytes(self, owner: bytes) -> int:
        """How much may be read for `owner` now; 0 or less: nothing, for a moment or until the window ends."""
        with self._lock:
            account, now_s, rate = self._of(owner), self._now_s(), self.quotas.peer_bytes_per_s
            account.credit_bytes += (now_s - account.credited_at_s) * rate
            account.credit_bytes = min(account.credit_bytes, max(rate * _BURST_S, 1.0))
            account.credited_at_s = now_s
            return int(account.credit_bytes)

    def charge(self, owner: bytes, num_bytes: int) -> bool:
        """Counts bytes that were read; False where they were one too many, and the circuit has to end."""
        with self._lock:
            account = self._of(owner)
            account.credit_bytes -= num_bytes
            account.num_bytes += num_bytes
            self.num_bytes += num_bytes
            return account.num_bytes <= self.quotas.peer_bytes

    def _of(self, owner: bytes) -> _Account:
        now_s = self._now_s()
        account = self._accounts.get(owner)
        if account is None:
            self._forget(now_s)
            account = self._accounts[owner] = _Account(now_s, now_s)
        if now_s - account.window_from_s > self.quotas.window_s:
            account.num_bytes, account.window_from_s = 0, now_s
        return account

    def _forget(self, now_s: float) -> None:
        """Accounts that hold nothing back any more, when there are many."""
        if len(self._accounts) >= MAX_ACCOUNTS:
            for owner, account in list(self._accounts.items()):
                if not account.num_circuits and now_s - account.window_from_s > self.quotas.window_s:
                    del self._accounts[owner]
            if len(self._accounts) >= MAX_ACCOUNTS:
                raise BusyError(f"{MAX_ACCOUNTS} peers were relayed lately: try another relay, or later")
