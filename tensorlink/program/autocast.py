"""Autocast as a program's nodes ask for it, whatever the caller's own autocast is.

Torch keeps the casts of weights for as long as a region lasts, so that a weight that is used twice is cast once and
its gradients are added in the lower precision. A run of a graph is one such region, as a plain loop makes one of each
forward: its gradients are bit for bit those of `with torch.autocast(...)` around the module. Neighbours:
`interpreter.py` (switches), `lowering.py` (reads the regions inside a module).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tensorlink.errors import TraceError
from tensorlink.program.values import AUTOCAST_DTYPES, DTYPE_NAMES


def name_of(dtype: torch.dtype | None) -> str:
    """The name under which nodes hold a dtype of autocast, "" for None. Raises TraceError for one that it has not."""
    name = "" if dtype is None else DTYPE_NAMES.get(dtype, str(dtype))
    if name and name not in AUTOCAST_DTYPES:
        needed = " or ".join(f"torch.{each}" for each in AUTOCAST_DTYPES)
        raise TraceError(f"found autocast={dtype}, needed {needed}, or None")
    return name


def device_type(device: torch.device) -> str:
    """The device whose rules hold; tensors without data follow none."""
    return "cpu" if device.type == "meta" else device.type


def switch(device: torch.device, name: str) -> None:
    """Autocast to the dtype of this name from here on; "" switches it off."""
    kind = device_type(device)
    torch.set_autocast_enabled(kind, bool(name))
    if name:
        torch.set_autocast_dtype(kind, AUTOCAST_DTYPES[name])


@contextmanager
def region(device: torch.device, name: str = "") -> Iterator[None]:
    """Autocast to the dtype of this name ("" for none), until `switch` says otherwise; as before afterwards."""
    kind = device_type(device)
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    torch.autocast_increment_nesting()
    try:
        switch(device, name)
        yield
    finally:
        torch.set_autocast_enabled(kind, before[0])
        torch.set_autocast_dtype(kind, before[1])
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
