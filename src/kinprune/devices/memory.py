"""Memory: what an exported model takes of a device's memory, measured in a process that runs nothing else.

How the options were chosen, on one x86 core, in MB over the runtime's own and in ms an image (ResNet-18 of 64 px with
44.7 MB of weights, MobileNetV2 of 96 px with 9.1 MB):

===================================================  =========  ===========
options                                              ResNet-18  MobileNetV2
===================================================  =========  ===========
ONNX Runtime's defaults                              158, 6 ms  33, 1.3 ms
no memory arena, no pattern                          137, 6 ms  31, 1.3 ms
and weights left in the file's layout (*extended*)   55, 8 ms   13, 4 ms
===================================================  =========  ===========

The defaults keep weights in several layouts. So what is least in memory is slower for convolutions; a session that has
room takes ``session_options()``.
"""

from __future__ import annotations

import base64
import importlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kinprune.devices import memory_process
from kinprune.errors import ExportError

RUNS = 5
"""Images that the model answers while its memory is measured, one after the other."""

_LEAN: dict[str, Any] = {
    "give_back": 65_536,
    "enable_mem_pattern": False,
    "graph_optimization_level": "ORT_ENABLE_EXTENDED",
    "entries": {
        "session.use_device_allocator_for_initializers": "1",
        "optimization.disable_specified_optimizers": "ConvMulFusion",
    },
}
_QUIET = 4


@dataclass(frozen=True)
class MemoryUse:
    """What a model took of memory, in bytes.

    ``peak_bytes`` is the most that was resident at one time, over the ``baseline_bytes`` of a process that had already
    run a trivial model; ``loading_bytes`` the most while it was loaded, ``resident_bytes`` what stayed after the last
    image, both over the same. ``exact`` is False where the system did not let the peak begin at the baseline: then the
    figures may be too large, never too small. ``runtime`` is ONNX Runtime's version.
    """

    peak_bytes: int
    loading_bytes: int
    resident_bytes: int
    baseline_bytes: int
    exact: bool
    runtime: str


def session_options(*, low_memory: bool = False, threads: int | None = None) -> Any:
    """ONNX Runtime's session options: its defaults, or with ``low_memory`` those that take the least memory.

    The latter keep no arena and no layout of the weights but the file's, and pack weights only in *int8*, where kernels
    are ten times as slow without. ``threads`` is how many a session takes. Raises ExportError without ONNX Runtime.
    """
    _package("onnxruntime")
    return memory_process.session_options(_settings(low_memory, threads))


def measure_memory(path: str | Path, *, threads: int = 1, runs: int = RUNS, timeout: float = 300.0) -> MemoryUse:
    """What the exported model ``path`` takes of memory while it is loaded and answers one image, ``runs`` times.

    It runs in a process of its own, which imports NumPy and ONNX Runtime, with ``session_options(low_memory=True)`` for
    its ``precision``. The baseline is taken after a trivial model has run. Only on Linux. Memory that is not of the
    model is in it by some hundred KB: pages of the runtime's code that no model before it had used.

    Raises:
        ExportError: the file is missing or damaged, takes anything but one batch of images, runs for longer than
            ``timeout`` seconds, the process was ended from outside, a package is missing, or the system is not Linux.
    """
    target = Path(path).expanduser()
    if sys.platform != "linux":
        raise ExportError(
            f"peak memory cannot be measured on {sys.platform}, expected Linux: go by what kinprune foresees "
            "(CostModel.peak_memory_bytes)"
        )
    if not target.is_file():
        raise ExportError(f"{target} is {'no file' if target.exists() else 'not there'}: give the file of an export")
    if runs < 1:
        raise ExportError(f"runs is {runs}, expected at least 1")
    _package("onnxruntime")
    asked = {
        "path": str(target.absolute()),
        "trivial": base64.b64encode(_trivial()).decode(),
        "settings": _settings(True, threads),
        "runs": runs,
    }
    found = _run(target, json.dumps(asked), timeout)
    baseline = found["baseline"]
    return MemoryUse(
        found["peak"] - baseline,
        found["loading"] - baseline,
        found["after"] - baseline,
        baseline,
        found["exact"],
        found["runtime"],
    )


def _settings(low_memory: bool, threads: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"log_severity_level": _QUIET}
    if threads is not None:
        settings["intra_op_num_threads"] = threads
    if low_memory:
        settings |= _LEAN
    return settings


def _run(target: Path, asked: str, timeout: float) -> dict[str, Any]:
    """What the measuring process says; from a folder of its own, so that no file there is taken for a module."""
    source = Path(memory_process.__file__).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-c", source], input=asked, capture_output=True, text=True, cwd=folder, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"{target.name} was not measured within {timeout:g} seconds: give it more time, or a smaller model"
            ) from error
    if done.returncode < 0:
        raise ExportError(
            f"the process that ran {target.name} was ended by signal {-done.returncode}: free memory if the system is "
            "short of it, and measure again"
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ExportError(f"the process that ran {target.name} failed: {reason}; see that onnxruntime imports")
    found: dict[str, Any] = json.loads(done.stdout)
    if "error" in found:
        raise ExportError(f"ONNX Runtime cannot {found['stage']} {target.name}: {found['error']}; export it again")
    return found


def _trivial() -> bytes:
    """A model of one operation, which starts up whatever the runtime starts up for its first model."""
    onnx = _package("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    images, logits = (helper.make_tensor_value_info(name, kind, [1, 3, 8, 8]) for name in ("images", "logits"))
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["logits"])], "trivial", [images], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f'ONNX needs the package {name!r} ({error}): pip install "kinprune[onnx]"') from error
