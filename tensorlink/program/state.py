"""Names of a module's tensors: one canonical name each, whatever ties and sharing there are; constants by content."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from tensorlink.errors import TraceError
from tensorlink.program.alignment import aligned
from tensorlink.program.graph import BufferSpec, ParameterSpec
from tensorlink.program.values import DTYPE_NAMES
from tensorlink.program.weights import CONSTANT_PREFIX, constant_digest


@dataclass
class ModuleState:
    """A module's parameters and buffers by canonical name, which is the first of a tied tensor's names.

    `aliases` maps every other name to the canonical one. `constants` fills while graphs are lowered.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    persistent: frozenset[str]
    aliases: dict[str, str]
    constants: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> ModuleState:
        """Reads the names; raises TraceError for a dtype that programs do not hold."""
        first: dict[int, str] = {}
        aliases: dict[str, str] = {}
        parameters: dict[str, nn.Parameter] = {}
        buffers: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), name) == name:
                parameters[name] = parameter
            else:
                aliases[name] = first[id(parameter)]
        for name, buffer in module.named_buffers(remove_duplicate=False):
            if first.setdefault(id(buffer), name) == name:
                buffers[name] = buffer
            else:
                aliases[name] = first[id(buffer)]
        for name, tensor in [*parameters.items(), *buffers.items()]:
            if tensor.dtype not in DTYPE_NAMES:
                raise TraceError(f"{name!r} is {tensor.dtype}, which programs do not hold; convert it before tracing")
        persistent = frozenset(module.state_dict(keep_vars=True)) & buffers.keys()
        return cls(parameters, buffers, persistent, aliases)

    def canonical(self, name: str) -> str:
        """The canonical name of a parameter or buffer."""
        return self.aliases.get(name, name)

    def constant(self, tensor: Tensor) -> str:
        """The name under which a constant travels: a digest of dtype, shape and content, so that the program binds
        it."""
        kept = aligned(tensor.detach())
        dtype = DTYPE_NAMES.get(kept.dtype)
        if dtype is None:
            raise TraceError(f"the code holds a constant tensor of {kept.dtype}, which programs do not hold")
        name = CONSTANT_PREFIX + constant_digest(kept)
        self.constants.setdefault(name, kept)
        return name

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """What the program declares of each parameter."""
        return {
            name: ParameterSpec(DTYPE_NAMES[parameter.dtype], tuple(parameter.shape), parameter.requires_grad)
            for name, parameter in self.parameters.items()
        }

    def buffer_specs(self) -> dict[str, BufferSpec]:
        """What the program declares of each buffer and constant."""
        specs = {
            name: BufferSpec(DTYPE_NAMES[buffer.dtype], tuple(buffer.shape), name in self.persistent)
            for name, buffer in self.buffers.items()
        }
        for name, tensor in self.constants.items():
            specs[name] = BufferSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), persistent=False, constant=True)
        return specs
