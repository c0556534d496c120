"""`python -m smartnodes_core.chain.devnet`: runs the embedded chain until it is told to end.

Ends with code 0 on SIGTERM, on Ctrl-C and, with `--exit-with-parent`, when its standard input is closed; with code 2
and one line on standard error where a port, a journal or a path is at fault.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from smartnodes_core.errors import LocalError


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except LocalError as error:
        sys.stderr.write(f"devnet: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m smartnodes_core.chain.devnet", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8545, help="0 takes any free one (default: %(default)s)")
    parser.add_argument(
        "--journal", type=Path, help="file that survives a kill; without it the chain is in memory only"
    )
    parser.add_argument(
        "--checkpoint-entries",
        type=int,
        default=100,
        help="transactions between two checkpoints of the journal (default: %(default)s)",
    )
    parser.add_argument(
        "--ready-fd", type=int, help="write the URL to this file descriptor when listening, and close it"
    )
    parser.add_argument("--ready-file", type=Path, help="write the URL to this file when listening")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when standard input is closed")
    return parser


def _run(options: argparse.Namespace) -> int:
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    if options.exit_with_parent:
        threading.Thread(target=_watch_stdin, args=(ended,), daemon=True).start()
    # Imported late: the parser answers --help at once, and signals are handled while py-evm loads.
    from smartnodes_core.chain.devnet.journal import DevnetJournal
    from smartnodes_core.chain.devnet.ledger import Ledger
    from smartnodes_core.chain.devnet.methods import Methods
    from smartnodes_core.chain.devnet.server import RpcServer

    journal = DevnetJournal(options.journal) if options.journal else None
    ledger = Ledger(journal, checkpoint_entries=max(1, options.checkpoint_entries))
    server = RpcServer(Methods(ledger), options.host, options.port)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2})
    serving.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # the starter was interrupted: nobody is left to serve
            _tell(server.url, options)
            ended.wait()
    finally:
        server.shutdown()
        serving.join()
        ledger.close()  # waits for the transaction in hand
        server.server_close()
    return 0


def _watch_stdin(ended: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    ended.set()


def _tell(url: str, options: argparse.Namespace) -> None:
    if options.ready_fd is not None:
        with os.fdopen(options.ready_fd, "w") as pipe:
            pipe.write(url + "\n")
    if options.ready_file is not None:
        # Renamed into place: a reader never sees half of it.
        part = options.ready_file.with_suffix(".part")
        part.write_text(url + "\n", encoding="utf-8")
        part.replace(options.ready_file)
    if options.ready_fd is None and options.ready_file is None:
        sys.stdout.write(url + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
