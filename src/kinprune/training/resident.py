"""How much memory a process really takes while something runs, as the system counts it."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _STATM, _CLEAR = Path("/proc/self/status"), Path("/proc/self/statm"), Path("/proc/self/clear_refs")
_EVERY = 0.002
"""Seconds between two looks, where the system does not keep the peak itself."""


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_OWN_BLOCK = 64 * 2**10
"""Bytes from which, inside ``returned_at_once``, a block of memory is a mapping of its own."""
_USUAL_BLOCK = 32 * 2**20
"""What that size grows to by itself in a process that has freed large blocks; the other is twice as much."""


def give_back_unused() -> None:
    """Give the pages that the C library holds free back to the system, where it can (glibc).

    Memory kept for later would hide what is taken next, and stand beside it.
    """
    trim = _of_library("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Every block of memory but small ones goes back to the system as soon as it is freed inside (glibc).

    Otherwise free blocks are kept, with holes between those in use, and a pass takes up to three times the memory of
    its tensors. The price is time: the system clears every page that it gives out, and a pass takes a third to four
    fifths longer. Afterwards the sizes are those that glibc itself comes to in a process with large blocks.
    """
    tune = _of_library("mallopt")
    if tune is None:
        yield
        return
    tune(_MMAP_THRESHOLD, _OWN_BLOCK)
    tune(_TRIM_THRESHOLD, _OWN_BLOCK)
    free, held = _fill_holes()
    try:
        yield
    finally:
        for block in held:
            free(block)
        tune(_MMAP_THRESHOLD, _USUAL_BLOCK)
        tune(_TRIM_THRESHOLD, 2 * _USUAL_BLOCK)


def _fill_holes() -> tuple[Callable[[int], None], list[int]]:
    """Take the holes of the heap that large blocks would be put in, for they are used before mappings are made.

    They are not written to, so that they stay without memory. Returns how to free the blocks, and the blocks.
    """
    give_back_unused()
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    held: list[int] = []
    size = 2**30
    while size >= _OWN_BLOCK:
        block: int | None = library.malloc(size)
        # The word before a block holds its size, and in the second bit whether it is a mapping.
        if block is not None and not ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2:
            held.append(block)
            continue
        library.free(block)
        size //= 2
    return library.free, held


def _of_library(name: str) -> Callable[..., int] | None:
    """A function of glibc; None where another C library is in use."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    return getattr(ctypes.CDLL(None), name, None)


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
