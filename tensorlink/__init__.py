"""Train PyTorch models on the GPUs of people who do not know each other, where bad work is found out.

Names are imported on first use: the node process of a rig imports this package and must never load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorlink.model import DistributedModel
    from tensorlink.network import LocalNetwork, connect
    from tensorlink.optimizer import DistributedOptimizer
    from tensorlink.plain import reference

__version__ = "0.1.0"

_HOMES = {
    "DistributedModel": "tensorlink.model",
    "DistributedOptimizer": "tensorlink.optimizer",
    "LocalNetwork": "tensorlink.network",
    "connect": "tensorlink.network",
    "reference": "tensorlink.plain",
}

__all__ = ["DistributedModel", "DistributedOptimizer", "LocalNetwork", "connect", "reference"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tensorlink' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
