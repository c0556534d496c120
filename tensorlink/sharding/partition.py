"""Cuts a traced model into stage programs of about equal seconds.

Neighbours: `profile.py` (what nodes cost), `cuts.py` (where a cut can be), `matching.py` (the same cut in evaluation
mode), `balance.py` (which cuts), `assembly.py` (the programs). `plan.py` puts the stages onto workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tensorlink.errors import PartitionError
from tensorlink.program.graph import StageProgram
from tensorlink.program.trace import TracedModel
from tensorlink.sharding.assembly import Boundary, assemble
from tensorlink.sharding.balance import Candidate, bottleneck, choose, most_stages, thinned
from tensorlink.sharding.cuts import CutMap, cut_map
from tensorlink.sharding.matching import Matching
from tensorlink.sharding.private import Private, PrivateCut, private_ends, refuse_ties, take_ends
from tensorlink.sharding.profile import Profile

#: How much slower the slowest stage may become to keep all uses of a tied parameter in one stage.
TIE_TOLERANCE = 0.10


def partition(
    traced: TracedModel,
    profile: Profile,
    num_stages: int,
    *,
    speeds: Sequence[float] | None = None,
) -> list[StageProgram]:
    """`num_stages` programs that compute, one after the other, what the traced model computes.

    Balances the profile's seconds divided by `speeds` (one figure a stage, in order) and then minimises the bytes
    that cross. Every stage has at least one parameter where the model has any. The uses of a tied parameter stay in
    one stage where that makes the slowest stage at most TIE_TOLERANCE slower; else it is in the program of each stage
    that uses it, which names them as its `holders`. Raises PartitionError with the number of stages that is possible.
    """
    return partition_between(traced, profile, num_stages, speeds=speeds).stages


def partition_between(
    traced: TracedModel,
    profile: Profile,
    num_stages: int,
    private: Private = (),
    *,
    speeds: Sequence[float] | None = None,
) -> PrivateCut:
    """As `partition`, of what lies between the `private` layers: the least that holds those and shows no worker an
    input or a label. Raises PartitionError too for layers that are unknown, in the middle, or tied to a stage.
    """
    if num_stages < 1:
        raise PartitionError(f"{num_stages} stages were asked for, at least 1 is needed")
    if num_stages == 1 and not private:
        return PrivateCut(None, [traced.whole()], None)
    figures = list(speeds) if speeds is not None else [1.0] * num_stages
    if len(figures) != num_stages or min(figures) <= 0:
        raise PartitionError(f"speeds {figures} for {num_stages} stages: one positive figure per stage is needed")
    train, evaluation = _maps(traced)
    matching = Matching(train, evaluation)
    places, boundaries, refusals = _places(traced, profile, train, matching)
    first, last = 0, len(train.graph.nodes)
    if private:
        num_bytes = {candidate.position: candidate.num_bytes for candidate, _ in places}
        first, last = private_ends(traced, matching, boundaries, num_bytes, private)
    candidates = _candidates([(c, plain) for c, plain in places if first <= c.position <= last])
    chosen = choose(candidates, num_stages, figures)
    if chosen is None:
        raise _too_many(candidates, refusals, num_stages)
    tied = _tied_positions(train, first, last)
    untied = [at for at, candidate in enumerate(candidates) if candidate.position not in tied]
    kept = [candidates[at] for at in untied]
    together = choose(kept, num_stages, figures)
    if together is not None:
        limit = bottleneck(candidates, chosen, figures) * (1 + TIE_TOLERANCE)
        if bottleneck(kept, together, figures) <= limit:
            chosen = [untied[at] for at in together]
    positions = [first, *(candidates[at].position for at in chosen), last]
    programs = assemble(traced, matching, [boundaries[at] for at in positions if 0 < at < len(train.graph.nodes)])
    cut = take_ends(programs, num_stages, has_head=first > 0)
    refuse_ties(cut)
    return cut


def _maps(traced: TracedModel) -> tuple[CutMap, CutMap]:
    written = cut_map(traced.train, traced.gradients).written | cut_map(traced.eval, frozenset()).written
    # values that need a gradient do so in both modes, for evaluation may run with gradients too
    return cut_map(traced.train, traced.gradients, written), cut_map(traced.eval, frozenset(), written)


def _places(
    traced: TracedModel, profile: Profile, train: CutMap, matching: Matching
) -> tuple[list[tuple[Candidate, bool]], dict[int, Boundary], Counter[str]]:
    """The graph's ends and every position that can be cut in both modes; True where what crosses lies in plain order
    in memory."""
    nodes = train.graph.nodes
    seconds, layers = [0.0], [0]
    seen: set[str] = set()
    for node in nodes:
        seconds.append(seconds[-1] + profile.cost_s(node.id))
        new = set(node.parameters()) - seen
        seen |= new
        layers.append(layers[-1] + bool(new))
    if not seen:  # a model without parameters: any work will do for a stage
        layers = list(range(len(layers)))
    found = [(Candidate(0, 0.0, 0, 0), True)]
    boundaries: dict[int, Boundary] = {}
    refusals: Counter[str] = Counter()
    for position in range(1, len(nodes)):
        reason = train.refusal(position)
        matched = None if reason else matching.position(position)
        if matched is None:
            refusals[reason or "training and evaluation mode compute different things there"] += 1
            continue
        eval_position, values = matched
        num_bytes = sum(profile.value_bytes.get(value, 0) for value in values)
        boundaries[position] = Boundary(position, eval_position, tuple(values))
        plain = all(train.info(v).permutation == tuple(range(len(train.info(v).shape))) for v in values)
        found.append((Candidate(position, seconds[position], num_bytes, layers[position]), plain))
    found.append((Candidate(len(nodes), seconds[-1], 0, layers[-1]), True))
    return found, boundaries, refusals


def _candidates(places: Sequence[tuple[Candidate, bool]]) -> list[Candidate]:
    """The first and last place and those in between, in plain memory order unless that allows fewer stages."""
    inner = places[1:-1]
    first, last = places[0][0], places[-1][0]
    anywhere = [first, *(candidate for candidate, _ in inner), last]
    in_order = [first, *(candidate for candidate, plain in inner if plain), last]
    return thinned(anywhere if most_stages(in_order) < most_stages(anywhere) else in_order)


def _tied_positions(train: CutMap, first: int, last: int) -> set[int]:
    """Positions between `first` and `last` with uses of one parameter on both sides."""
    spans: dict[str, tuple[int, int]] = {}
    for index, node in enumerate(train.graph.nodes[first:last], first):
        for name in node.parameters():
            spans[name] = (spans.get(name, (index, index))[0], index)
    return {position for begin, end in spans.values() for position in range(begin + 1, end + 1)}


def _too_many(candidates: Sequence[Candidate], refusals: Counter[str], num_stages: int) -> PartitionError:
    possible = most_stages(candidates)
    layers = candidates[-1].layers_before - candidates[0].layers_before
    text = (
        f"{num_stages} stages were asked for; the model has {layers} layers with parameters and "
        f"{len(candidates) - 2} places to cut, "
        f"enough for {possible} stages: set stages to at most {possible}, or use a deeper model"
    )
    if refusals and possible < min(num_stages, layers):
        reason, count = refusals.most_common(1)[0]
        text += f" (at {count} places: {reason})"
    return PartitionError(text)
