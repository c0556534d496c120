"""Errors of the PyTorch layer; those of the network below are in `smartnodes_core.errors`."""

from __future__ import annotations

from smartnodes_core.errors import LocalError, PeerFault, SmartnodesError


class TraceError(LocalError):
    """The module cannot be turned into a stage program; the message names the line and a remedy."""

    code = "trace"


class PartitionError(LocalError):
    """The program cannot be cut into the number of stages asked for."""

    code = "partition"


class OptimizerError(LocalError):
    """An optimizer or option that workers do not run."""

    code = "optimizer"


class CheckpointError(LocalError):
    """A checkpoint that is damaged, unfinished or of another model; the message names the file or the tensor."""

    code = "checkpoint"


class FraudError(SmartnodesError):
    """A worker cheated, and what came of it cannot be undone here; the message says from which step on, and what to
    do."""

    code = "fraud"


class NonFiniteError(SmartnodesError):
    """NaN or infinity where training needs finite numbers; the message says where it was first seen."""

    code = "non-finite"


class RemoteParameterError(LocalError, RuntimeError):
    """A parameter that lives on a worker was used as if it were here; the message names our method."""

    code = "remote-parameter"


class ProgramError(PeerFault):
    """A stage program that is not well-formed or over a limit; the message names the offending node."""

    code = "program"


class OverLimitError(ProgramError):
    """A program, or the sizes it is to run on, that cost more than is allowed on this machine."""

    code = "over-limit"


class TensorError(PeerFault):
    """A tensor whose dtype, shape, size or digest is not what was agreed."""

    code = "tensor"


class InputError(LocalError, ValueError):
    """What was passed does not fit what was traced: another structure, dtype or shape; the message names the input."""

    code = "input"
