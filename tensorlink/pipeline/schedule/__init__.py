"""Schedules of a pipeline as data: who computes what, in which order, and what that costs.

`actions.py` says what a schedule is, `generators.py` and `zero_bubble.py` make the known ones, `catalogue.py` has them
by name. `simulation.py` plays one against given costs and refuses one that is wrong or cannot finish; `timetable.py` is
when everything ran, simulated or recorded, as a grid of text, and `picture.py` draws it. No torch here.
"""

from tensorlink.pipeline.schedule.actions import Action, Kind, Schedule, max_held, max_in_flight
from tensorlink.pipeline.schedule.catalogue import GENERATORS, generate
from tensorlink.pipeline.schedule.generators import gpipe, interleaved, one_forward_one_backward
from tensorlink.pipeline.schedule.simulation import UNIT_COSTS, Costs, simulate
from tensorlink.pipeline.schedule.timetable import Run, Timetable
from tensorlink.pipeline.schedule.zero_bubble import zero_bubble, zero_bubble_v

__all__ = [
    "GENERATORS",
    "UNIT_COSTS",
    "Action",
    "Costs",
    "Kind",
    "Run",
    "Schedule",
    "Timetable",
    "generate",
    "gpipe",
    "interleaved",
    "max_held",
    "max_in_flight",
    "one_forward_one_backward",
    "simulate",
    "zero_bubble",
    "zero_bubble_v",
]
