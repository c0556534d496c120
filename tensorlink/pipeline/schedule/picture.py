"""A timetable as a picture: a row for each worker, a box for each action with the number of its micro-batch.

Simulated and recorded timetables are drawn alike, so that what was planned and what happened can be laid side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from smartnodes_core.errors import ConfigError
from tensorlink.pipeline.schedule.actions import Kind
from tensorlink.pipeline.schedule.timetable import Timetable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: dict[Kind, tuple[float, float, float]] = {
    "F": (0.26, 0.52, 0.86),
    "B": (0.18, 0.63, 0.48),
    "I": (0.18, 0.63, 0.48),
    "W": (0.93, 0.62, 0.20),
}
NAMES: dict[Kind, str] = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
FORMATS = ("pdf", "png", "svg")
#: With more boxes than this in a row the numbers would run into each other.
MAX_NUMBERED = 120


def draw(timetable: Timetable, path: Path, title: str = "", unit: str = "units of time") -> None:
    """Write the picture to `path`, in the format that its name ends in: .png, .svg or .pdf.

    Raises ConfigError for another ending.
    """
    from matplotlib.figure import Figure

    if path.suffix.lstrip(".") not in FORMATS:
        raise ConfigError(f"a picture at {path}: its name must end in one of {', '.join(FORMATS)}")
    figure = Figure(figsize=(12, 1.2 + 0.5 * timetable.num_workers), layout="constrained")
    axes = figure.add_subplot()
    draw_on(axes, timetable)
    axes.set_xlabel(unit)
    axes.set_title(title or f"{timetable.makespan:g} {unit}, {timetable.bubble:.1%} idle", fontsize=10)
    figure.savefig(path, dpi=150)


def draw_on(axes: Axes, timetable: Timetable) -> None:
    """Draw into a part of a larger picture. On a worker with several stages, later ones are paler."""
    from matplotlib.patches import Patch

    numbered = len(timetable.runs) <= MAX_NUMBERED * timetable.num_workers
    for worker in range(timetable.num_workers):
        stages = [stage for stage, holder in enumerate(timetable.placement) if holder == worker]
        for run in timetable.runs:
            if run.action.stage not in stages:
                continue
            paler = 0.55 * stages.index(run.action.stage) / len(stages)
            colour = tuple(part + (1 - part) * paler for part in COLOURS[run.action.kind])
            span = (run.start, run.end - run.start)
            axes.broken_barh([span], (worker - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.4)
            if numbered:
                middle, number = (run.start + run.end) / 2, str(run.action.micro_batch)
                axes.text(middle, worker, number, ha="center", va="center", fontsize=6, clip_on=True)
    axes.set_yticks(range(timetable.num_workers), [f"worker {worker}" for worker in range(timetable.num_workers)])
    axes.invert_yaxis()
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    kinds = [kind for kind in NAMES if any(run.action.kind == kind for run in timetable.runs)]
    patches = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in kinds]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
