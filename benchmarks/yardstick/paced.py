"""A worker whose every action takes a given time, however small its stage: the floor stands in for computing where a
machine has fewer cores than the pipeline has workers.

    python benchmarks/yardstick/paced.py worker MILLISECONDS [flags of tensorlink-worker]

Everything but the pace is the real worker: processes, TLS, hashing, commitments.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> object:
    """`worker` is the node; it starts this file again as `compute`, its computing process."""
    role, milliseconds, flags = sys.argv[1], sys.argv[2], sys.argv[3:]
    return _worker(milliseconds, flags) if role == "worker" else _compute(float(milliseconds) / 1e3)


def _worker(milliseconds: str, flags: list[str]) -> int:
    from yardstick.rig import run_worker  # here: a computing process has no use for what a node loads

    return run_worker((sys.executable, str(Path(__file__).resolve()), "compute", milliseconds), flags)


def _compute(floor_s: float) -> None:
    from tensorlink.compute import main
    from tensorlink.compute_stages import Stages
    from tensorlink.pipeline.stage import Stage

    class PacedStage(Stage):
        """F, I and W take `floor_s` each, a whole backward twice that."""

        def _paced(self, begun: float, floors: float) -> None:
            time.sleep(max(0.0, begun + floors * floor_s - time.perf_counter()))

        def _compute_forward(self, *args):  # type: ignore[no-untyped-def]
            begun = time.perf_counter()
            found = super()._compute_forward(*args)
            self._paced(begun, 1.0)
            return found

        def _compute_backward(self, passed, *args):  # type: ignore[no-untyped-def]
            begun, whole = time.perf_counter(), passed.deferred is None
            found = super()._compute_backward(passed, *args)
            self._paced(begun, 2.0 if whole else 1.0)
            return found

        def _compute_weight_gradients(self, *args):  # type: ignore[no-untyped-def]
            begun = time.perf_counter()
            found = super()._compute_weight_gradients(*args)
            self._paced(begun, 1.0)
            return found

    class PacedStages(Stages):
        make_stage = PacedStage

    main(lambda channel: PacedStages(channel))


if __name__ == "__main__":
    sys.exit(main())
