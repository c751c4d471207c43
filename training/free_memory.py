"""How much memory a computation may take here before something dies for it."""

from pathlib import Path

import jax

_MEMINFO = Path("/proc/meminfo")

# Limit, use and statistics of this process's own cgroup, version 2 and version 1.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def free_bytes(device: jax.Device) -> int | None:
    """Free bytes on the device, for a CPU those of the machine or its container; None if unknown.

    A CPU that runs out kills the process instead of raising, so it has to be known before.
    """
    if device.platform != "cpu":
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return None
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    all_free = [_machine(), *(_container(*names) for names in _CGROUPS)]
    return min((free for free in all_free if free is not None), default=None)


def _machine() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    kibibytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return kibibytes["MemAvailable"] * 1024


def _container(limit: str, used: str, statistics: str) -> int | None:
    """Free bytes under a cgroup's limit, file cache counted as free; None where none is set."""
    try:
        counts = dict(line.split() for line in _cgroup(statistics).splitlines())
        cache = int(counts.get("inactive_file", 0))
        return int(_cgroup(limit)) - int(_cgroup(used)) + cache
    except (OSError, ValueError):  # no such cgroup, or a limit of "max"
        return None


def _cgroup(name: str) -> str:
    return Path("/sys/fs/cgroup", name).read_text(encoding="ascii")
