"""Evidence that was announced is there after any death of its auditor."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from blake3 import blake3

from smartnodes_core.errors import LocalError, RecordError
from smartnodes_core.evidence import split
from smartnodes_core.nodes import evidence_shelf as module
from smartnodes_core.nodes.evidence_shelf import EvidenceShelf
from smartnodes_core.records import Evidence

#: Keeps evidence for ever, and says so each time when it is durable.
KEEPER = """
import sys
from pathlib import Path
from tests.smartnodes_core.nodes.test_evidence_shelf import evidence_over
from smartnodes_core.nodes.evidence_shelf import EvidenceShelf
shelf, number = EvidenceShelf(Path(sys.argv[1])), int(sys.argv[2])
while True:
    body = bytes([number % 256]) * (200_000 + number)
    sys.stdout.write(shelf.put(evidence_over(body), memoryview(body)).hex() + "\\n")
    sys.stdout.flush()
    number += 1
"""


def evidence_over(body: bytes) -> Evidence:
    parts = dict.fromkeys(("job", "plan", "spec", "commitment", "order", "challenge", "opening"), b"part")
    lists = {name: [b"part"] for name in ("earlier", "lists", "reveals", "grounds")}
    return Evidence(**parts, **lists, body_digest=blake3(body).digest(), body_bytes=len(body))


def put(shelf: EvidenceShelf, body: bytes) -> bytes:
    return shelf.put(evidence_over(body), memoryview(body))


@pytest.mark.parametrize("is_durable", [False, True])
def test_what_was_kept_is_given_back(is_durable: bool, tmp_path: Path) -> None:
    shelf = EvidenceShelf(tmp_path if is_durable else None)
    digests = [put(shelf, body) for body in (b"one", b"", b"three" * 1000)]
    again = EvidenceShelf(tmp_path) if is_durable else shelf
    for digest, body in zip(digests, (b"one", b"", b"three" * 1000), strict=True):
        record, opened = again.get(digest)
        assert Evidence.decode(record) == evidence_over(body)
        assert opened == body
    with pytest.raises(RecordError, match="no such evidence"):
        again.get(bytes(32))


def test_what_an_auditor_announced_survives_kills_at_random_instants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, told = random.Random(3), list[bytes]()
    for life in range(3):
        command = [sys.executable, "-c", KEEPER, str(tmp_path), str(1000 * life)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as keeper:
            assert keeper.stdout is not None
            told.append(bytes.fromhex(keeper.stdout.readline()))
            threading.Timer(draw.uniform(0.0, 0.03), keeper.kill).start()
            told += [bytes.fromhex(line) for line in keeper.stdout if len(line) == 65]
        assert keeper.returncode == -9
    shelf = EvidenceShelf(tmp_path)
    for digest in told[-module.MAX_KEPT :]:
        record, opened = shelf.get(digest)
        assert blake3(opened).digest() == Evidence.decode(record).body_digest
    assert not list(tmp_path.glob("*.draft"))
    assert len(list(tmp_path.iterdir())) <= module.MAX_KEPT


@pytest.mark.parametrize("is_durable", [False, True])
def test_what_is_kept_is_capped_and_the_oldest_go(
    is_durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT", 3)
    shelf = EvidenceShelf(tmp_path if is_durable else None)
    digests = [put(shelf, bytes([number])) for number in range(10)]
    for number, digest in enumerate(digests):
        if number < 7:
            with pytest.raises(RecordError):
                shelf.get(digest)
        else:
            shelf.get(digest)
    monkeypatch.setattr(module, "MAX_EVIDENCE_BYTES", 1)
    last = put(shelf, b"last")
    assert list(shelf._sizes) == [last]
    assert len(list(tmp_path.iterdir())) == (1 if is_durable else 0)


def test_the_oldest_go_after_a_restart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = EvidenceShelf(tmp_path)
    digests = [put(shelf, bytes([number])) for number in range(3)]
    for number, digest in enumerate(reversed(digests)):
        os.utime(shelf._path(digest), (number, number))
    monkeypatch.setattr(module, "MAX_KEPT", 3)
    again = EvidenceShelf(tmp_path)
    put(again, b"new")
    with pytest.raises(RecordError):
        again.get(digests[2])
    again.get(digests[0])


def test_a_file_that_is_damaged_is_told_and_not_given(tmp_path: Path) -> None:
    shelf = EvidenceShelf(tmp_path)
    digests = [put(shelf, bytes([number]) * 100) for number in range(4)]
    damages = [b"", b"short", b"\xff" * 200, shelf._path(digests[0]).read_bytes()]
    damages[3] = damages[3].replace(b"part", b"trap")
    for digest, damage in zip(digests, damages, strict=True):
        shelf._path(digest).write_bytes(damage)
        with pytest.raises(RecordError):
            shelf.get(digest)


@pytest.mark.parametrize("is_durable", [False, True])
def test_a_verdict_is_kept_behind_its_evidence_once(is_durable: bool, tmp_path: Path) -> None:
    shelf = EvidenceShelf(tmp_path if is_durable else None)
    digest = put(shelf, b"opened")
    shelf.add_verdict(digest, b"verdict")
    again = EvidenceShelf(tmp_path) if is_durable else shelf
    assert again.get(digest)[1] == b"opened"
    assert split(again._load(digest)).verdict == b"verdict"
    with pytest.raises(RecordError, match="already"):
        again.add_verdict(digest, b"other")
    with pytest.raises(RecordError, match="no such evidence"):
        again.add_verdict(bytes(32), b"verdict")


def test_a_folder_that_cannot_be_used_is_a_local_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalError, match="cannot be read"):
        EvidenceShelf(tmp_path / "file")
    (tmp_path / "mine.evidence").write_bytes(b"")
    with pytest.raises(LocalError, match="not named by a digest"):
        EvidenceShelf(tmp_path)
    shelf = EvidenceShelf(tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    with pytest.raises(LocalError, match="cannot be written"):
        put(shelf, b"x")
