"""What peers may call: methods named `rpc_…`, with who may call them and how large a body they take.

Everything here is decided from the frame's header, before memory for the body is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from smartnodes_core.errors import AuthorityError, ProtocolError
from smartnodes_core.records import Role
from smartnodes_core.transport.base import Peer
from smartnodes_core.wire import Buffer

DEFAULT_MAX_BODY_BYTES = 1 << 20

Result = dict[str, Any] | tuple[dict[str, Any], Sequence[Buffer]] | None
Handler = Callable[[Peer, dict[str, Any], memoryview], Result]
Function = TypeVar("Function", bound=Callable[..., Any])

_RULE = "__rpc_rule__"


@dataclass(frozen=True)
class Rule:
    """Who may call a method (None: any admitted peer), the largest body that it takes, the name of a check, and whether
    a connection that carries nothing else may be closed (`uses.py`).
    """

    roles: tuple[Role, ...] | None = None
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    check: str = ""
    passing: bool = False


def allow(
    *,
    roles: Sequence[Role] | None = None,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    check: str = "",
    passing: bool = False,
) -> Callable[[Function], Function]:
    """Decorates an `rpc_…` method: only peers of these roles may call it, with a body of at most `max_body_bytes`.

    `check` names a method of the same object, `(caller, params, num_body_bytes) -> None`, that raises a
    SmartnodesError to refuse a call from its header alone. It runs on the connection's thread: it must not wait.
    `passing` calls do not keep a connection open.
    """
    rule = Rule(None if roles is None else tuple(roles), max_body_bytes, check, passing)

    def mark(function: Function) -> Function:
        setattr(function, _RULE, rule)
        return function

    return mark


@dataclass(frozen=True)
class Method:
    """A served method."""

    name: str
    handler: Handler
    rule: Rule
    own_check: Callable[[Peer, dict[str, Any], int], None] | None = None

    def check(self, peer: Peer, params: dict[str, Any], num_body_bytes: int) -> None:
        """Raises AuthorityError, ProtocolError or what the method's own check raises, before a body is allocated."""
        if self.rule.roles is not None and peer.role not in self.rule.roles:
            raise AuthorityError(f"{peer} may not call {self.name}: it is for {' and '.join(self.rule.roles)} nodes")
        if num_body_bytes > self.rule.max_body_bytes:
            raise ProtocolError(
                f"{self.name} takes a body of at most {self.rule.max_body_bytes} bytes, not {num_body_bytes}"
            )
        if self.own_check is not None:
            self.own_check(peer, params, num_body_bytes)


def methods_of(obj: object) -> dict[str, Method]:
    """The methods of `obj` named `rpc_x`, under the name x."""
    found = {}
    for attribute in dir(obj):
        if attribute.startswith("rpc_"):
            name, function = attribute.removeprefix("rpc_"), getattr(obj, attribute)
            rule = getattr(function, _RULE, Rule())
            found[name] = Method(name, function, rule, getattr(obj, rule.check) if rule.check else None)
    return found


class StreamReceiver:
    """Takes the tensors of one topic, on the connection's owner thread.

    `allocate(peer, header, num_bytes)` gives the memory before the body is read. A ProtocolError ends the connection;
    any other SmartnodesError has the frame skipped. `receive(peer, header, body)` is called with the filled memory.
    Both hold up everything else on the connection: return soon.
    """

    def __init__(
        self,
        allocate: Callable[[Peer, dict[str, Any], int], memoryview],
        receive: Callable[[Peer, dict[str, Any], memoryview], None],
    ) -> None:
        self.allocate, self.receive = allocate, receive
