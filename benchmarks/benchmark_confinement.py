"""What confinement costs: training steps of one stage in a computing process, confined and not, in turns.

Prints the median CPU seconds of a step on either side and their ratio. The peer is the same process without Landlock,
namespaces and seccomp.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time


def measure(confined: bool, width: int, steps: int) -> list[float]:
    """CPU seconds of each step, in this process, confined first if wanted."""
    if confined:
        from smartnodes_core.confinement import confine
        from smartnodes_core.sandbox import Limits

        done = confine(Limits(), 0, os.getppid())
        if any(what.startswith(("files", "system calls")) for what in done.missing):
            raise SystemExit(f"nothing to compare here: {done.missing}")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/"
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    module = nn.Sequential(layer, nn.Flatten(0, 1), nn.Linear(width, 256))
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False)
    x, y = torch.randn(16, 64, width), torch.randint(0, 256, (16 * 64,))
    seconds = []
    for _ in range(steps + 3):
        began = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
    return seconds[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=["confined", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.stdout.write(json.dumps(measure(options.child == "confined", options.width, options.steps)))
        return
    found: dict[str, list[float]] = {"plain": [], "confined": []}
    ratios = []
    for _ in range(options.rounds):
        for kind in found:
            command = [
                sys.executable,
                __file__,
                "--child",
                kind,
                f"--width={options.width}",
                f"--steps={options.steps}",
            ]
            output = subprocess.run(command, check=True, capture_output=True).stdout
            found[kind].append(statistics.median(json.loads(output)))
        ratios.append(found["confined"][-1] / found["plain"][-1])
    for kind, seconds in found.items():
        print(f"{kind:9} {1000 * statistics.median(seconds):8.2f} ms CPU a step")
    print(f"ratio     {statistics.median(ratios):8.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
