"""How much memory this process may still take."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_bytes() -> int | None:
    """Return the memory available in bytes, a container's limit included; None where the system does not say.

    On macOS the whole memory is returned: what is free there says little.
    """
    found = [size for size in (_machine(), *(_container(*paths) for paths in _CGROUPS)) if size is not None]
    return min(found) if found else None


def _machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _container(limit: str, used: str) -> int | None:
    try:
        text = Path(limit).read_text().strip()
        return max(int(text) - int(Path(used).read_text()), 0) if text != "max" else None
    except OSError:  # no such control group
        return None
