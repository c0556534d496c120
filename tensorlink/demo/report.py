"""The demo's result for people: a table, a verdict in a line, a JSON file and a picture of both loss curves."""

from __future__ import annotations

import json
from pathlib import Path

from tensorlink.demo.run import DemoResult

TOLERANCE = 1e-5


def lines(result: DemoResult) -> list[str]:
    """What the demo says at its end."""
    rows = ["", "worker    stages  work units   audits passed  failed  reputation    SNO earned"]
    for worker in result.workers:
        stages = ", ".join(map(str, worker["stages"])) or "spare"
        rows.append(
            f"{worker['worker'][:8]}  {stages:>6}  {worker['work_units']:11.3e}  {worker['audits_passed']:13d}"
            f"  {worker['audits_failed']:6d}  {worker['reputation']:10d}  {worker['sno_earned']:12.3f}"
        )
    rows += _of_cheat(result)
    difference = result.loss_relative_difference
    verdict = "as in" if difference <= TOLERANCE else "NOT as in"
    rows += [
        "",
        f"losses {verdict} one plain process: largest relative difference {difference:.1e} (at most {TOLERANCE:.0e})",
        f"validation loss: {result.validation_before:.3f} before, {result.validation_after:.3f} after "
        f"{len(result.losses)} steps",
        f"{result.tokens_per_s:,.0f} tokens/s, first step after {result.seconds_to_first_step:.1f} s, "
        f"{result.rounds} rounds on chain, {result.run_s:.0f} s in all; the plain process took {result.plain_s:.0f} s",
    ]
    return rows


def is_good(result: DemoResult) -> bool:
    """Whether the demo showed what it is to show."""
    caught = not result.options.cheat or (bool(result.recoveries) and result.cheat_reputation == 0)
    return caught and result.loss_relative_difference <= TOLERANCE


def _of_cheat(result: DemoResult) -> list[str]:
    if not result.options.cheat:
        return []
    found = result.cheat_found
    if found is None:
        return ["", f"the cheat {result.options.cheat!r} was NOT found in {len(result.losses)} steps"]
    standing = "blacklisted on chain" if result.cheat_reputation == 0 else f"of reputation {result.cheat_reputation}"
    rows = ["", f"worker {found.worker.hex()[:8]} ({result.options.cheat}) was found: {found.reason}; now {standing}"]
    for one in result.recoveries:
        moved = ", ".join(f"stage {stage} to worker {worker}" for stage, worker in one.moved.items())
        rows.append(
            f"the run went back to step {one.first_step} with {moved}, and did {one.num_done_again} steps again in "
            f"{one.again_s:.1f} s"
        )
    return rows


def write(result: DemoResult, path: Path) -> Path:
    """Write the JSON report to `path` and the picture beside it; returns the picture's path."""
    path.write_text(json.dumps(result.as_report(), indent=1) + "\n", encoding="utf-8")
    picture = path.with_suffix(".png")
    draw(result, picture)
    return picture


def draw(result: DemoResult, path: Path) -> None:
    """Both loss curves, drawn so that one can be told from the other where they coincide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(result.plain_losses, linewidth=4, alpha=0.35, label="one plain process")
    axes.plot(result.losses, linewidth=1, color="black", label="distributed over strangers' workers")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per byte)")
    axes.set_title(f"largest relative difference {result.loss_relative_difference:.1e}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
