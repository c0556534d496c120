"""What a round may settle: closed work of those whose key is theirs."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from smartnodes_core.nodes.settleable import Settleable


def test_work_of_a_contested_key_waits_until_a_round_has_said_whose_it_is():
    contested = {b"victim"}
    commitments = {
        b"1": SimpleNamespace(worker=b"victim", open=False),
        b"2": SimpleNamespace(worker=b"other", open=False),
        b"3": SimpleNamespace(worker=b"other", open=True),
    }
    audited = SimpleNamespace(commitments=commitments, window_closed=lambda commitment: not commitment.open)
    audits = SimpleNamespace(lock=threading.Lock(), jobs={b"job": audited})
    membership = SimpleNamespace(is_contested=lambda worker: worker in contested)
    records = Settleable(audits, membership, None, lambda digests: [])
    assert set(records.payable()) == {b"2"}
    contested.clear()
    assert set(records.payable()) == {b"1", b"2"}
