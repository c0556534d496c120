"""Where in the user's code something came from: for messages that name a line, and for matching the two modes."""

from __future__ import annotations

import linecache
import re
import traceback
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_TORCH = str(Path(torch.__file__).parent)
_LAYERS = str(Path(torch.nn.__file__).parent)
_OURS = str(Path(__file__).parent)


def _foreign(filename: str) -> bool:
    return filename.startswith((_TORCH, _OURS, "torch/", "<")) or "/torch/" in filename


def line_of(node: fx.Node) -> str:
    """`file:line (function): code` of the innermost frame that made the node, outside torch if one is, "" if
    unknown."""
    known = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [frame for frame in known if not _foreign(frame[0])] or known
    return _written(frames[-1][0], int(frames[-1][1]), frames[-1][2]) if frames else ""


def line_of_error(error: BaseException) -> str:
    """The same for the innermost frame outside torch in the error's chain of tracebacks, else inside torch.nn."""
    current: BaseException | None = error
    found = ""
    while current is not None:
        every = traceback.extract_tb(current.__traceback__)
        frames = [frame for frame in every if not _foreign(frame.filename)]
        frames = frames or [frame for frame in every if not found and frame.filename.startswith(_LAYERS)]
        if frames and frames[-1].name != "trace":
            found = _written(frames[-1].filename, frames[-1].lineno or 0, frames[-1].name)
        current = current.__cause__ or current.__context__
    return found


def line_of_caller() -> str:
    """The same for the innermost frame of the running code."""
    frames = [frame for frame in traceback.extract_stack() if not _foreign(frame.filename)]
    return _written(frames[-1].filename, frames[-1].lineno or 0, frames[-1].name) if frames else ""


def _written(filename: str, line: int, function: str) -> str:
    code = linecache.getline(filename, line).strip()
    return f"{filename}:{line} ({function})" + (f": {code[:120]}" if code else "")


def module_of(node: fx.Node) -> str:
    """The path of the submodule that made the node, such as "layers.3.attention"; "" for the outermost."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if not entry[0].startswith("_empty")]
    return str(paths[-1]) if paths else ""
