from __future__ import annotations

import threading
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartnodes_core.audit import (
    WHOLE_STEP,
    HashChain,
    Opened,
    Selection,
    TipTracker,
    assigned_validators,
    check_challenge,
    hash_link,
    link_disagreements,
    seed_of,
    select,
    sharing_disagreements,
)
from smartnodes_core.errors import AuditError
from smartnodes_core.records import NO_DIGEST, AuditTerms, Challenge, Commitment, ReceivedList, Reveal, Unit

VALIDATORS = [bytes([number] * 32) for number in range(1, 6)]
JOB = b"j" * 32


def terms(unit_rate_ppm: int = 0, step_rate_ppm: int = 0) -> AuditTerms:
    return AuditTerms(unit_rate_ppm=unit_rate_ppm, step_rate_ppm=step_rate_ppm, window_steps=1, window_s=1, auditors=[])


def commitment(stage: int = 0, roots: list[dict[str, bytes]] | None = None) -> Commitment:
    units = [
        Unit(call=0, backward_pass=0, micro_batch=number, roots=each)
        for number, each in enumerate(roots if roots is not None else [{}, {}, {}])
    ]
    return Commitment(
        job=JOB,
        plan_version=0,
        replica=0,
        stage=stage,
        step=0,
        worker=b"w" * 32,
        numeric_class="",
        previous=JOB,
        roots={},
        units=units,
        shared_roots={},
        order=NO_DIGEST,
        squared_norm="",
        clip_coefficient="",
        work_units=1,
    )


# -- hash chains ------------------------------------------------------------------------------------------------------


def test_each_preimage_hashes_to_the_one_before_and_the_first_to_the_tip():
    chain = HashChain(b"s" * 32, length=5)
    assert hash_link(chain.reveal(1)) == chain.tip
    for index in range(2, 6):
        assert hash_link(chain.reveal(index)) == chain.reveal(index - 1)


@pytest.mark.parametrize("index", [0, -1, 6])
def test_a_chain_has_no_preimage_beyond_its_ends(index):
    with pytest.raises(AuditError, match="new chain"):
        HashChain(b"s" * 32, length=5).reveal(index)


@given(order=st.permutations(range(1, 9)))
def test_preimages_are_checked_in_whatever_order_they_come(order):
    chain = HashChain(b"s" * 32, length=8)
    tracker = TipTracker(chain.tip)
    for index in order:
        assert not tracker.check(index, chain.reveal(index % 8 + 1))
        assert tracker.check(index, chain.reveal(index))
        assert tracker.check(index, chain.reveal(index))


@pytest.mark.parametrize("index", [0, -3, 1 << 40])
def test_a_preimage_off_the_chain_is_refused_without_hashing(index):
    chain = HashChain(b"s" * 32, length=5)
    assert not TipTracker(chain.tip).check(index, chain.tip)


def test_a_tracker_may_be_asked_by_many_threads():
    chain = HashChain(b"s" * 32, length=400)
    tracker, wrong = TipTracker(chain.tip), []

    def ask(offset: int) -> None:
        wrong.extend(index for index in range(1 + offset, 401, 4) if not tracker.check(index, chain.reveal(index)))

    threads = [threading.Thread(target=ask, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- drawing ----------------------------------------------------------------------------------------------------------


def test_three_validators_are_assigned_and_all_where_there_are_fewer():
    assigned = assigned_validators(JOB, VALIDATORS)
    assert len(assigned) == 3
    assert assigned == sorted(assigned) == assigned_validators(JOB, VALIDATORS[::-1])
    assert assigned_validators(JOB, VALIDATORS[:2]) == VALIDATORS[:2]


def test_every_validator_is_assigned_its_share_of_jobs():
    counts = Counter(v for number in range(500) for v in assigned_validators(number.to_bytes(32), VALIDATORS))
    assert all(240 < counts[validator] < 360 for validator in VALIDATORS)  # 300 expected, sigma 11


def test_the_seed_depends_on_every_preimage_and_on_the_commitment():
    preimages = {validator: validator for validator in VALIDATORS[:3]}
    seed = seed_of(preimages, JOB)
    assert seed == seed_of(dict(reversed(preimages.items())), JOB)
    assert seed != seed_of(preimages, bytes(32))
    for validator in preimages:
        assert seed_of({**preimages, validator: bytes(32)}, JOB) != seed


@settings(max_examples=50)
@given(seed=st.binary(min_size=32, max_size=32), num_units=st.integers(0, 40))
def test_rates_of_none_and_all_select_none_and_all(seed, num_units):
    assert select(seed, terms(), num_units, VALIDATORS) == []
    every = select(seed, terms(unit_rate_ppm=1_000_000), num_units, VALIDATORS)
    assert [selection.unit for selection in every] == list(range(num_units))
    assert len({selection.auditor for selection in every}) <= 1
    whole = select(seed, terms(step_rate_ppm=1_000_000), num_units, VALIDATORS)
    assert [(selection.tier, selection.unit) for selection in whole] == [(2, WHOLE_STEP)]


def test_units_are_selected_at_the_rate_of_the_job():
    num = sum(
        len(select(seed_of({}, number.to_bytes(32)), terms(unit_rate_ppm=100_000), 10, VALIDATORS))
        for number in range(1000)
    )
    assert 880 < num < 1120  # 1000 expected of 10,000, sigma 30


class Drawn:
    """A draw of three validators over one commitment that selects every unit."""

    def __init__(self) -> None:
        self.commitment = commitment()
        self.terms = terms(unit_rate_ppm=1_000_000)
        self.chains = {validator: HashChain(validator, length=4) for validator in VALIDATORS[:3]}
        self.assigned = VALIDATORS[:3]
        digest = self.commitment.digest()
        self.lists = [
            ReceivedList(job=JOB, validator=validator, reveal=2, commitments=[digest]) for validator in self.assigned
        ]
        self.reveals = [
            Reveal(
                job=JOB,
                validator=received.validator,
                reveal=2,
                received_list=received.digest(),
                preimage=self.chains[received.validator].reveal(2),
            )
            for received in self.lists
        ]
        self.seed = seed_of({reveal.validator: reveal.preimage for reveal in self.reveals}, digest)
        self.selection = select(self.seed, self.terms, 3, self.assigned)[0]
        self.challenge = Challenge(
            job=JOB,
            commitment=digest,
            tier=1,
            unit=self.selection.unit,
            seed=self.seed,
            reveals=[],
            auditor=self.selection.auditor,
        )

    def check(self, **changes) -> None:
        parts = {
            "challenge": self.challenge,
            "commitment": self.commitment,
            "terms": self.terms,
            "assigned": self.assigned,
            "lists": self.lists,
            "reveals": self.reveals,
            "tips": {validator: TipTracker(chain.tip) for validator, chain in self.chains.items()},
        }
        check_challenge(**{**parts, **changes})


def replaced(records, index, **changes):
    return [*records[:index], msgspec.structs.replace(records[index], **changes), *records[index + 1 :]]


def test_a_challenge_that_the_seed_selects_is_accepted():
    Drawn().check()


def test_a_challenge_is_refused_for_whatever_does_not_follow():
    drawn = Drawn()
    change = msgspec.structs.replace
    other = next(validator for validator in drawn.assigned if validator != drawn.selection.auditor)
    cases = [
        ("another commitment", {"challenge": change(drawn.challenge, commitment=bytes(32))}),
        ("another commitment", {"challenge": change(drawn.challenge, job=bytes(32))}),
        ("does not follow", {"challenge": change(drawn.challenge, seed=bytes(32))}),
        ("does not select tier 1, unit 9", {"challenge": change(drawn.challenge, unit=9)}),
        ("does not select tier 2", {"challenge": change(drawn.challenge, tier=2, unit=-1)}),
        ("does not select", {"challenge": change(drawn.challenge, auditor=other)}),
        ("does not select", {"terms": terms()}),
        ("list that does not hold", {"lists": drawn.lists[:2]}),
        ("list that does not hold", {"lists": replaced(drawn.lists, 0, commitments=[bytes(32)])}),
        ("list that does not hold", {"lists": replaced(drawn.lists, 0, reveal=3)}),
        ("list that does not hold", {"reveals": replaced(drawn.reveals, 1, received_list=bytes(32))}),
        ("does not lead to the tip", {"reveals": replaced(drawn.reveals, 1, preimage=bytes(32))}),
        ("does not lead to the tip", {"tips": {}}),
        ("2 preimages", {"reveals": drawn.reveals[:2]}),
        ("0 preimages", {"reveals": []}),
        ("preimages, needed one of each", {"assigned": VALIDATORS[1:4]}),
    ]
    for complaint, changes in cases:
        with pytest.raises(AuditError, match=complaint):
            drawn.check(**changes)


# -- both ends of a link ----------------------------------------------------------------------------------------------


def test_stages_that_agree_on_their_link_have_no_fault():
    before = commitment(0, [{"y": b"1" * 32, "gy": b"2" * 32}])
    after = commitment(1, [{"x": b"1" * 32, "gx": b"2" * 32, "y": b"3" * 32}])
    assert link_disagreements(before, after) == []


@pytest.mark.parametrize(
    ("roots", "fault"),
    [
        ([{"x": b"9" * 32, "gx": b"2" * 32}], "micro-batch 0: y of stage 0 is not x of 1"),
        ([{"x": b"1" * 32, "gx": b"9" * 32}], "micro-batch 0: gy of stage 0 is not gx of 1"),
        ([{"x": b"1" * 32, "gx": b"2" * 32}, {}], "micro-batch 1 of call 0 is committed by stage 1 only"),
        ([], "micro-batch 0 of call 0 is committed by stage 0 only"),
    ],
)
def test_every_contradiction_of_two_neighbours_is_named(roots, fault):
    before = commitment(0, [{"y": b"1" * 32, "gy": b"2" * 32}])
    assert link_disagreements(before, commitment(1, roots)) == [fault]


def shared(stage, **roots):
    return msgspec.structs.replace(
        commitment(stage), shared_roots={name.replace("_", "/"): r for name, r in roots.items()}
    )


def test_stages_that_agree_on_what_they_shared_have_no_fault():
    one = shared(0, to_2=b"1" * 32, from_2=b"2" * 32, to_1=b"9" * 32)
    assert sharing_disagreements(one, shared(2, to_0=b"2" * 32, from_0=b"1" * 32)) == []
    assert sharing_disagreements(commitment(0), commitment(1)) == []


@pytest.mark.parametrize(
    ("roots", "fault"),
    [
        ({"to_0": b"2" * 32, "from_0": b"9" * 32}, "what stage 0 sent to stage 2 is not what 2 received"),
        ({"to_0": b"9" * 32, "from_0": b"1" * 32}, "what stage 2 sent to stage 0 is not what 0 received"),
        ({"to_0": b"2" * 32}, "what stage 0 sent to stage 2 is not what 2 received"),
    ],
)
def test_every_contradiction_of_stages_that_share_is_named_whichever_comes_first(roots, fault):
    one, other = shared(0, to_2=b"1" * 32, from_2=b"2" * 32), shared(2, **roots)
    assert sharing_disagreements(one, other) == sharing_disagreements(other, one) == [fault]


def test_what_a_worker_signs_when_it_opens_is_frozen():
    opened = Opened(opening=b"o", body_digest=bytes(range(32)), order_digest=bytes(range(32)))
    assert opened.encode().hex() == (
        "84ab626f64795f646967657374c420"
        + bytes(range(32)).hex()
        + "a46b696e64a84f70656e65642f32a76f70656e696e67c4016fac6f726465725f646967657374c420"
        + bytes(range(32)).hex()
    )
    assert Opened.decode(opened.encode()) == opened


def test_a_selection_says_which_unit_and_who():
    assert Selection(1, 3, b"v") == Selection(1, 3, b"v") != Selection(1, 3, b"w")
