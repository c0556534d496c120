"""Who would cheat the rewards, and what it brings: used by `benchmark_attacks.py` and by tests."""
