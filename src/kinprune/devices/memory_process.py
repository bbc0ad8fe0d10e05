"""The process that measures: it imports NumPy and ONNX Runtime, runs one model, and tells its own peak memory.

``memory`` starts it from this file's text, so it may import nothing of Kinprune: whatever it imported would be memory
that a device does not spend. What to do comes as JSON on standard input, what was found goes as JSON to standard
output.
"""

from __future__ import annotations

import base64
import ctypes
import json
import sys
from typing import Any

RESET = "/proc/self/clear_refs"
STATUS = "/proc/self/status"
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of malloc.h
ELEMENTS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


def session_options(settings: dict[str, Any]) -> Any:
    """ONNX Runtime's options: attributes by name, an enumeration's value as its name, ``entries`` as entries.

    ``give_back`` is the size in bytes from which freed blocks of the heap go back to the system at once.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for name, value in settings.items():
        if name == "entries":
            for key, entry in value.items():
                options.add_session_config_entry(key, entry)
        elif name == "give_back":
            give_back(value)
        elif isinstance(value, str):
            setattr(options, name, getattr(type(getattr(options, name)), value))
        else:
            setattr(options, name, value)
    return options


def give_back(size: int) -> bool:
    """Have freed blocks of ``size`` bytes and more go back to the system at once; False where the C library cannot.

    The GNU C library raises that size with every such block that is freed, up to 32 MB: what the runtime frees while it
    loads a model would stay in the heap.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return all(mallopt(parameter, size) == 1 for parameter in (MMAP_THRESHOLD, TRIM_THRESHOLD))


def reset_peak(path: str = RESET) -> bool:
    """Let the peak begin at what is resident now; False where the system does not permit that."""
    try:
        with open(path, "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def resident() -> tuple[int, int]:
    """Bytes of this process that are in memory, now and at the peak."""
    found = {}
    with open(STATUS) as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                found[name] = 1024 * int(value.split()[0])
    return found["VmRSS"], found["VmHWM"]


def image_for(session: Any) -> dict[str, Any]:
    """One image of the size and type that the model takes."""
    import numpy as np

    (taken,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in taken.shape]
    return {taken.name: np.zeros(shape, dtype=ELEMENTS[taken.type])}


def measure(path: str, trivial: bytes, settings: dict[str, Any], runs: int) -> dict[str, Any]:
    """Bytes before the model, while it is loaded and at the peak of all; or ``error`` and the ``stage`` it was in."""
    import onnxruntime

    def load(model: str | bytes) -> Any:
        return onnxruntime.InferenceSession(model, session_options(settings), providers=["CPUExecutionProvider"])

    first = load(trivial)
    first.run(None, image_for(first))
    del first
    exact = reset_peak()
    baseline, _ = resident()
    stage = "read"
    try:
        session = load(path)
        _, loading = resident()
        stage = "run"
        image = image_for(session)
        for _ in range(runs):
            session.run(None, image)
    except Exception as error:  # ONNX Runtime's errors have no base of their own
        return {"error": str(error) or type(error).__name__, "stage": stage}
    after, peak = resident()
    return {
        "baseline": baseline,
        "loading": loading,
        "peak": peak,
        "after": after,
        "exact": exact,
        "runtime": onnxruntime.__version__,
    }


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    asked["trivial"] = base64.b64decode(asked["trivial"])
    print(json.dumps(measure(**asked)))
