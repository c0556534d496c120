"""Coverage-guided search for bytes that a target does not survive: a crash, a hang, or memory that grows.

    pip install --editable '.[fuzz]'     (atheris has wheels up to Python 3.11)
    python tests/smartnodes_core/fuzz/fuzz.py TARGET [--seconds 600] [--corpus FOLDER]

Begins with the committed corpus; what it finds of interest goes to FOLDER, a crash to a file beside it. Prints one line
of JSON at its end. Exit code 0: nothing was found.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
HANG_S, GROWTH_MB = 10, 512


def search(name: str, folder: str, seconds: int) -> None:
    """Runs in a process of its own: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["smartnodes_core", "msgpack", "targets"]):
        sys.path.insert(0, str(HERE))
        import targets  # type: ignore[import-not-found]
    logging.disable(logging.CRITICAL)
    target = targets.TARGETS[name]
    options = [f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-rss_limit_mb={GROWTH_MB}", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, "-max_len=8192", f"-artifact_prefix={folder}-", folder], target)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", help="where findings go; a temporary folder when left out")
    parser.add_argument("--search", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        search(options.target, options.corpus, options.seconds)
        return
    folder = options.corpus or tempfile.mkdtemp(prefix=f"fuzz-{options.target}-")
    os.makedirs(folder, exist_ok=True)
    for seed in (HERE / "corpus" / options.target).glob("*"):
        (Path(folder) / seed.name).write_bytes(seed.read_bytes())
    started_s = time.monotonic()
    arguments = [sys.executable, __file__, options.target, "--search", "--corpus", folder]
    done = subprocess.run([*arguments, "--seconds", str(options.seconds)], stderr=subprocess.PIPE, text=True)
    stats = dict(
        line.removeprefix("stat::").split(":", 1) for line in done.stderr.splitlines() if line.startswith("stat::")
    )
    report = {
        "target": options.target,
        "seconds": round(time.monotonic() - started_s),
        "runs": int(stats.get("number_of_executed_units", "0")),
        "corpus": len(list(Path(folder).glob("*"))),
        "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10,
        "found": [str(path) for path in Path(folder).parent.glob(f"{Path(folder).name}-*")],
        "exit_code": done.returncode,
    }
    print(json.dumps(report))
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        sys.exit(1)


if __name__ == "__main__":
    main()
