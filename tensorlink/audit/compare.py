"""When is a result that differs still honest? Policy over tensors, without any knowledge of where they come from.

A replay in float64 and replays with other kernels and thread counts show how far honest results of this very unit lie
apart: a spread per tensor. Fraud is a distance above 10 spreads and above a floor relative to the norm; an element that
is zero in every replay, and not by chance, must be zero. In half precision, where float64 shows the spread of many
elements, 4 spreads are enough, and rounding points anywhere while a scaled result points along the true one: the
projection error, what a tensor is scaled by less 1, is held against a tighter limit. The optimizer's update is compared
per element in units of the last place. What is accepted is measured all the same: `drift.py` adds it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_SIGMA = 10.0
MAX_ULP = 16.0
#: In half precision the spread of this many elements and more is known well enough for fewer of them, as long as it is
#: less than a tenth of the norm; the floor is then what a rounding or two of the result itself can do.
MIN_ELEMENTS, HALF_SIGMA, HALF_SPREAD = 64, 4.0, 0.1
HALF_FLOORS = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
#: The projection error that is never held against a worker in half precision, nor are so many spreads; of tensors with
#: fewer elements it says nothing.
MAX_PROJECTION, PROJECTION_SIGMA, PROJECTION_ELEMENTS = 2e-3, 1.5, 256
#: Relative distance that is never held against a worker, by the dtype it declared.
FLOORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
#: A replay farther from the others than this drew other random numbers or branched elsewhere: it measures nothing. In
#: half precision noise alone may come to much of the norm; other dropout masks come to more than a tenth.
MAX_SIGMA, HALF_MAX_SIGMA, HALF_MAX_SIGMA_OF_RANDOM = 1e-2, 0.5, 0.1


@dataclass(frozen=True)
class Deviation:
    """A tensor that honest computation does not give. `distance` and `allowed` are L2 norms."""

    name: str
    distance: float
    allowed: float
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason} (distance {self.distance:.3g}, allowed {self.allowed:.3g})"


@dataclass(frozen=True)
class Room:
    """How far from `centre` an honest tensor may lie (`allowed`, an L2 norm) and how much it may be scaled
    (`projection`, a share; 0: no limit of its own)."""

    centre: Tensor
    allowed: float
    projection: float


def room(replays: Sequence[Tensor], exact: Tensor | None) -> Room:
    """What honest replays, in their own precision and where one could be had in float64, leave to a worker."""
    dtype = replays[0].dtype
    centre = (replays[0] if exact is None else exact).double()
    norm = float(torch.linalg.vector_norm(centre))
    spread = max(float(torch.linalg.vector_norm(replay.double() - centre)) for replay in replays)
    if exact is None or dtype not in HALF_FLOORS or centre.numel() < MIN_ELEMENTS or not spread < HALF_SPREAD * norm:
        return Room(centre, max(NUM_SIGMA * spread, FLOORS[dtype] * norm), 0.0)
    # an error of so many spreads that is a scaling and nothing else: no worse can be honest
    scale = max(MAX_PROJECTION, PROJECTION_SIGMA * spread / norm) if centre.numel() >= PROJECTION_ELEMENTS else 0.0
    return Room(centre, max(HALF_SIGMA * spread, HALF_FLOORS[dtype] * norm), scale)


def projection(claimed: Tensor, centre: Tensor) -> float:
    """By how much `claimed` is scaled against `centre`: <claimed, centre> / <centre, centre> - 1."""
    there, here = centre.double().reshape(-1), claimed.double().reshape(-1)
    squared = float(torch.dot(there, there))
    return float(torch.dot(here - there, there)) / squared if squared > 0 else 0.0


def deviation(
    name: str, claimed: Tensor, replays: Sequence[Tensor], exact: Tensor | None, honest: Room | None = None
) -> Deviation | None:
    """What is wrong with `claimed`, given honest replays in its own precision and, where one could be had, in
    float64. `honest` is the room they leave, where it is known already. Zeros are `stray`'s."""
    if any(claimed.shape != replay.shape or claimed.dtype != replay.dtype for replay in replays):
        return Deviation(name, float("inf"), 0.0, f"has shape {list(claimed.shape)}, {list(replays[0].shape)} is right")
    if not claimed.is_floating_point():
        same = any(torch.equal(claimed, replay) for replay in replays)
        return None if same else Deviation(name, 1.0, 0.0, "is not what the program computes")
    honest = honest or room(replays, exact)
    centre = honest.centre
    distance = float(torch.linalg.vector_norm(claimed.double() - centre))
    if not distance <= honest.allowed:
        return Deviation(name, distance, honest.allowed, "lies outside what honest computation gives")
    if honest.projection:
        scaled = min((projection(claimed, one) for one in (centre, *replays)), key=abs)
        if not abs(scaled) <= honest.projection:
            return Deviation(name, abs(scaled), honest.projection, f"is the right result times {1 + scaled:.4f}")
    return None


def stray(name: str, claimed: Tensor, replays: Sequence[Tensor]) -> Deviation | None:
    """Where `claimed` is not zero and every one of `replays` is: no gradient flows there, or honest terms cancelled by
    chance, which a replay from inputs that are a little different tells apart."""
    zero = torch.ones_like(claimed, dtype=torch.bool)
    for replay in replays:
        zero &= replay == 0
    found = claimed[zero].abs()
    if found.numel() and float(found.max()) > 0:
        return Deviation(name, float(found.max()), 0.0, "is not zero where every replay is")
    return None


def usable_exact(exact: Mapping[str, Tensor], native: Mapping[str, Tensor], random: bool = False) -> bool:
    """Whether a float64 replay computed the same thing: all tensors together lie within `MAX_SIGMA` of the native
    one, or what stands for it in half precision. `random` where both drew masks, which may be the same."""
    total = apart = 0.0
    for name, tensor in native.items():
        if tensor.is_floating_point():
            centre = exact[name].double()
            total += float(centre.square().sum())
            apart += float((tensor.double() - centre).square().sum())
    most = MAX_SIGMA
    if any(tensor.dtype in HALF_FLOORS for tensor in native.values()):
        most = HALF_MAX_SIGMA_OF_RANDOM if random else HALF_MAX_SIGMA
    return apart <= most**2 * total


def update_deviation(
    name: str, before: Tensor | None, claimed: Tensor, replayed: Tensor, num_steps: int = 1
) -> Deviation | None:
    """What is wrong with an optimizer's result after `num_steps`: more than 16 units in the last place, for each of
    them, of the largest term that was added."""
    if claimed.shape != replayed.shape or claimed.dtype != replayed.dtype:
        return Deviation(name, float("inf"), 0.0, f"has shape {list(claimed.shape)}, {list(replayed.shape)} is right")
    if not claimed.is_floating_point() or not claimed.numel():
        return (
            None if torch.equal(claimed, replayed) else Deviation(name, 1.0, 0.0, "is not what the optimizer computes")
        )
    largest = replayed.abs().double()
    if before is not None:
        largest = torch.maximum(largest, before.abs().double())
    info = torch.finfo(claimed.dtype)
    allowed = num_steps * MAX_ULP * info.eps * largest + info.smallest_normal
    difference = (claimed.double() - replayed.double()).abs()
    over = ~(difference <= allowed)
    if not bool(over.any()):
        return None
    worst = float(torch.nan_to_num(difference - allowed, nan=float("inf")).argmax())
    at = int(worst)
    return Deviation(
        name,
        float(difference.reshape(-1)[at]),
        float(allowed.reshape(-1)[at]),
        f"{int(over.sum())} of {over.numel()} elements are not what the optimizer computes from the committed gradient",
    )
