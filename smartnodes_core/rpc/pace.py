"""How long peers' answers take, hence how long to wait: smoothed time and deviation, as TCP does (RFC 6298)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MIN_DEADLINE_S = 5.0
MAX_DEADLINE_S = 30.0  # also of the first call, when nothing was measured
NUM_DEVIATIONS = 8
#: A body counts from here, and crosses at no less than this until it was measured.
LARGE_BODY_BYTES = 256 << 10
FIRST_RATE_BYTES_PER_S = 1 << 20
RATE_MARGIN = 4
MAX_KNOWN = 4096


@dataclass
class _Measured:
    smoothed_s: float
    deviation_s: float
    num_missed: int = 0


class Pace:
    """What calls took, by peer and method; the peers' rates, by peer. The least recently measured are forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._measured: OrderedDict[tuple[bytes, str], _Measured] = OrderedDict()
        self._rates: OrderedDict[bytes, float] = OrderedDict()

    def deadline_s(self, peer: bytes, method: str, num_body_bytes: int = 0) -> float:
        """Seconds after which an answer is not to be waited for any longer."""
        with self._lock:
            measured = self._measured.get((peer, method))
            rate = self._rates.get(peer, FIRST_RATE_BYTES_PER_S)
        crossing_s = RATE_MARGIN * num_body_bytes / rate if num_body_bytes >= LARGE_BODY_BYTES else 0.0
        if measured is None:
            return MAX_DEADLINE_S + crossing_s
        expected_s = measured.smoothed_s + NUM_DEVIATIONS * measured.deviation_s
        patient_s = max(MIN_DEADLINE_S, expected_s) * 2.0**measured.num_missed
        return min(MAX_DEADLINE_S, patient_s) + crossing_s

    def answered(self, peer: bytes, method: str, took_s: float, num_body_bytes: int = 0) -> None:
        """An answer came after `took_s`."""
        with self._lock:
            if num_body_bytes >= LARGE_BODY_BYTES:
                rate = num_body_bytes / max(took_s, 1e-6)
                self._rates[peer] = 0.75 * self._rates.get(peer, rate) + 0.25 * rate
                self._keep(self._rates, peer)
                return
            measured = self._measured.get((peer, method))
            if measured is None:
                self._measured[peer, method] = _Measured(took_s, took_s / 2)
            else:
                error_s = abs(took_s - measured.smoothed_s)
                measured.deviation_s = 0.75 * measured.deviation_s + 0.25 * error_s
                measured.smoothed_s = 0.875 * measured.smoothed_s + 0.125 * took_s
                measured.num_missed = 0
            self._keep(self._measured, (peer, method))

    def missed(self, peer: bytes, method: str) -> None:
        """None came by its deadline: the next one is later."""
        with self._lock:
            measured = self._measured.get((peer, method))
            if measured is not None and MIN_DEADLINE_S * 2.0**measured.num_missed < MAX_DEADLINE_S:
                measured.num_missed += 1

    def _keep(self, known: OrderedDict[Any, Any], key: object) -> None:
        known.move_to_end(key)
        while len(known) > MAX_KNOWN:
            known.popitem(last=False)
