"""Every error of the peer-to-peer layer, grouped by what a caller can do about it.

`LocalError`: something on this machine is to be mended (configuration, a port, a key file, the chain's address).
`PeerFault`: the other side broke the protocol; only these may cost a peer its reputation.
`Unavailable`: nobody is at fault; waiting, or another peer, may help.

Messages say what was found, what is needed, and what to do.
"""

from __future__ import annotations


class SmartnodesError(Exception):
    """Root of all errors raised on purpose by `smartnodes_core` and the networks built on it."""

    #: Short stable name under which the error crosses a connection; subclasses inherit or replace it.
    code = "error"


# -- to be mended here ----------------------------------------------------------------------------------------------


class LocalError(SmartnodesError):
    """Something on this machine or in its settings is to be mended."""

    code = "local"


class ConfigError(LocalError):
    """A setting is missing, unknown or out of range."""

    code = "config"


class PortInUseError(LocalError):
    """The address to listen on is taken."""

    code = "port-in-use"


class IdentityError(LocalError):
    """A key file is missing, unreadable, too openly readable, or does not match its binding."""

    code = "identity"


class SandboxError(LocalError):
    """The computing process died, ran over a limit, or did not answer in time."""

    code = "sandbox"


class ChainError(LocalError):
    """The chain refused a call or a transaction; the message carries the contract's reason."""

    code = "chain"


class ChainUnreachableError(ChainError):
    """No answer from the chain's RPC endpoint."""

    code = "chain-unreachable"


class WrongChainError(ChainError):
    """The endpoint answers, but it is another chain, or the contracts are not there."""

    code = "wrong-chain"


# -- the other side broke the protocol ------------------------------------------------------------------------------


class PeerFault(SmartnodesError):
    """A peer did what the protocol forbids."""

    code = "peer-fault"


class ProtocolError(PeerFault):
    """A frame, header or message that cannot be decoded, is over its cap, or comes out of turn."""

    code = "protocol"


class RecordError(PeerFault):
    """Bytes that are not the canonical encoding of the record they claim to be."""

    code = "record"


class SignatureError(PeerFault):
    """A signature that does not verify under the key it names."""

    code = "signature"


class AuthorityError(PeerFault):
    """A peer without the identity, binding, registration, role or reputation that the call needs."""

    code = "authority"


class AuditError(PeerFault):
    """An opening that does not match its commitment, or a challenge its seed does not select."""

    code = "audit"


# -- nobody's fault: wait, or ask another -----------------------------------------------------------------------------


class Unavailable(SmartnodesError):
    """Not possible now; another peer or a later try may serve."""

    code = "unavailable"


class PeerUnreachableError(Unavailable):
    """No connection to the peer could be made."""

    code = "unreachable"


class ConnectionLostError(Unavailable):
    """The connection ended before the answer came."""

    code = "connection-lost"


class DeadlineError(Unavailable):
    """The answer did not come before the deadline; the message says what was waited for."""

    code = "deadline"


class CancelledError(Unavailable):
    """This side gave the call up before its answer came."""

    code = "cancelled"


class BusyError(Unavailable):
    """A queue or quota of the peer (or our own) is full."""

    code = "busy"


class VersionError(Unavailable):
    """A message of a version that the other side does not speak; the message names both."""

    code = "version"


class NoWorkersError(Unavailable):
    """Not enough workers for the job; the message gives the numbers found and needed."""

    code = "no-workers"


class JobError(SmartnodesError):
    """The job ended or cannot begin; the message names the stage and the worker."""

    code = "job"


class WorkerLostError(JobError):
    """A worker of the job died or fell silent."""

    code = "worker-lost"


class RemoteError(SmartnodesError):
    """A call was refused by the peer with an error this version has no class for."""

    code = "remote"
