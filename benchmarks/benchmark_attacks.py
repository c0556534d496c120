"""What five attackers gain over many rounds at the default settings, and with their defence taken away.

`python benchmarks/benchmark_attacks.py [--rounds 1000]`. Validators' rules are those that nodes run; what they sign is
carried by the model of the contracts, which `tests/.../test_contracts_against_model.py` holds equal to them. Attackers
compute for nothing and pay no gas.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from attacks import attackers
from attacks.attackers import SeedGrinder, by_the_last_digest

from smartnodes_core.chain.settings import SNO

WITHOUT = {
    "wash_trader": "work is paid without a cap",
    "key_squatter": "the first to name a key is admitted",
    "identity_splitter": "pay by the head",
    "seed_grinder": "the last digest draws the proposer",
    "bond_griefer": "no bond",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args(arguments).rounds
    began = time.monotonic()
    print(f"SNO gained in {rounds} rounds:\n{'attacker':20}{'default settings':>20}{'without defence':>20}")
    for name, off in WITHOUT.items():
        play = getattr(attackers, name)
        with_, without = play(rounds) / SNO, play(rounds, defended=False) / SNO
        print(f"{name:20}{with_:20,.6f}{without:20,.6f}  ({off})", flush=True)
    print("a wash trader that pays itself 100 SNO a round, by kappa:")
    for kappa in (1, 2, 5, 10, 20):
        gained = attackers.wash_trader(rounds, kappa_bps=kappa * 10_000) / SNO / rounds
        print(f"  kappa {kappa:2}: {gained:+10.4f} SNO a round", flush=True)
    print("how often one of four validators would propose if the last digest drew, by the variants it tries:")
    for tries in (0, 1, 3, 10, 600):
        grinder = SeedGrinder(rounds, by_the_last_digest, tries)
        grinder.play()
        print(f"  {tries:3} more: {100 * grinder.proposed / rounds:5.1f} % of rounds", flush=True)
    print(f"in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
