"""Resource limits: what the kernel counts for one process. Missing kinds, as on Windows, are left out."""

from __future__ import annotations

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

#: Address space beyond private memory and arenas: libraries, thread stacks, the allocator's reserves.
SLACK_BYTES = 16 << 30
MAX_THREADS = 4096


def lower(memory_bytes: int, num_files: int, file_bytes: int, shared_bytes: int, device: str, own_user: bool) -> str:
    """Lowers what may be lowered; raises OSError where the system has no such limits.

    `memory_bytes` 0 leaves memory unbounded. No file can be written beyond `file_bytes`, 0 for not at all. CUDA
    reserves address space by the terabyte, so that it gets no bound.
    """
    if resource is None:
        raise OSError("this system has no resource limits")
    if own_user:  # the kernel counts by user: elsewhere all that its user runs would count
        _lower("RLIMIT_NPROC", MAX_THREADS)
    names = ["no core dumps", f"{num_files} files"]
    names.append(f"files of at most {file_bytes >> 20} MiB" if file_bytes else "no file is written")
    _lower("RLIMIT_CORE", 0)
    _lower("RLIMIT_NOFILE", num_files)
    _lower("RLIMIT_FSIZE", file_bytes)
    _lower("RLIMIT_MSGQUEUE", 0)
    if memory_bytes:
        _lower("RLIMIT_DATA", memory_bytes)
        if device == "cpu":
            _lower("RLIMIT_AS", memory_bytes + shared_bytes + SLACK_BYTES)
        names.append(f"{memory_bytes >> 20} MiB of memory")
    return "limits: " + ", ".join(names)


def _lower(name: str, wanted: int) -> None:
    kind = getattr(resource, name, None)
    if kind is None:
        return
    hard = resource.getrlimit(kind)[1]
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (limit, limit))
