"""How much memory a process really takes while something runs, as the system counts it."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _STATM, _CLEAR = Path("/proc/self/status"), Path("/proc/self/statm"), Path("/proc/self/clear_refs")
_EVERY = 0.002
"""Seconds between two looks, where the system does not keep the peak itself."""


def give_back_unused() -> None:
    """Give the pages that the C library holds free back to the system, where it can (glibc).

    Memory kept for later would hide what is taken next, and what is done with would count on.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class Watch:
    """The peak of memory from when the watch is made to ``stop``, above what was taken at first.

    On CUDA this is what the caching allocator gave out; on Linux resident memory, all of it: tensors, what
    operations take inside themselves, and pages of libraries. Elsewhere nothing is measured. The kernel's own peak
    (``VmHWM``) is set back for it; where that is not allowed, resident memory is looked at every two milliseconds.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stop: Callable[[], int | None] = lambda: None
        give_back_unused()
        if device.type == "cuda":
            self.stop = _watch_cuda(device)
        elif _STATUS.exists():
            self.stop = _watch_kernel() or _watch_looking()


def _watch_cuda(device: torch.device) -> Callable[[], int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)

    def stop() -> int:
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - int(before)

    return stop


def _watch_kernel() -> Callable[[], int] | None:
    """None where the kernel's peak cannot be set back, or is not kept."""
    try:
        _CLEAR.write_text("5")
        before = _kernel("VmRSS")
    except OSError:
        return None
    # Some sandboxes take the write and do nothing.
    if before is None or (_kernel("VmHWM") or 0) > before + 2**20:
        return None
    return lambda: max((_kernel("VmHWM") or 0) - before, 0)


def _kernel(name: str) -> int | None:
    """A line of the process's status in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    return None if found is None else int(found[1]) * 1024


def _watch_looking() -> Callable[[], int]:
    page = os.sysconf("SC_PAGE_SIZE")
    done = threading.Event()

    def resident() -> int:
        return int(_STATM.read_text().split()[1]) * page

    before = resident()
    highest = [before]

    def look() -> None:
        while not done.wait(_EVERY):
            highest[0] = max(highest[0], resident())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()

    def stop() -> int:
        done.set()
        thread.join()
        return max(highest[0], resident()) - before

    return stop
