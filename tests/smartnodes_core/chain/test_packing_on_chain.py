"""The contract reads what `packing.py` writes."""

from __future__ import annotations

import random

from smartnodes_core.chain.packing import pack_reputations

from .conftest import NETWORK, World, contracts_world
from .test_round_execution import refused


def test_random_updates_land_in_their_lanes_and_nowhere_else(deployed: tuple[World, object]) -> None:
    from smartnodes_core.chain.devnet.accounts import devnet_accounts

    world = deployed[0]
    world.validators(3)
    num_members = 40
    for i in range(3, num_members):
        world.chain(i).register("user", world.key_hash(i), NETWORK)
    expected = [1] * num_members
    drawn = random.Random(5)
    for size in (1, 5, 31, 40, 40):
        chosen = drawn.sample(range(num_members), size)
        # validators keep a reputation above zero, or the quorum would shrink
        update = {i: drawn.randint(0 if i > 3 else 1, 255) for i in chosen}
        world.execute(world.proposal(reputations=pack_reputations(update)), 0, 1, 2)
        for index, value in update.items():
            expected[index] = value
        assert [member.reputation for member in world.chain().members(NETWORK)] == expected
    assert len(devnet_accounts()) > num_members


def test_malformed_updates_are_refused(devnet: object) -> None:
    world = contracts_world(devnet.url)[0]  # type: ignore[attr-defined]
    world.validators(3)
    for data in (b"\x00", bytes(39), bytes(6) + b"\x08" + bytes(32), b"\x00\x00\x01" + bytes(3) + b"\x01" + bytes(32)):
        with refused("BadReputationUpdate"):
            world.execute(world.proposal(reputations=data), 0, 1, 2)
