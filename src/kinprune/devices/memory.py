"""Memory: what an exported model takes of a device's memory, measured in a process that runs nothing else.

``session_options(low_memory=True)`` is what takes least. Whole models in MB over the runtime's own and in ms an image,
on one x86 core with ONNX Runtime 1.32:

=====================  ========  ============  ============
model, pixels          weights   defaults      low memory
=====================  ========  ============  ============
ResNet-18, 64          44.7      158, 8.4 ms   54.6, 11.0 ms
MobileNetV2, 96        8.9       31.2, 3.5 ms  13.4, 7.3 ms
ViT-tiny, 96           22.0      42.6, 15 ms   27.0, 14 ms
ResNet-18, 64, int8    11.3      27.7, 1.9 ms  16.6, 2.4 ms
MobileNetV2, 96, int8  2.6       10.8, 1.6 ms  7.3, 2.2 ms
ViT-tiny, 96, int8     5.9       16.2, 6.0 ms  13.8, 5.4 ms
=====================  ========  ============  ============

By default the runtime rearranges the weights of convolutions for its kernels, which makes them faster and keeps the
weights twice and more; what it frees while it loads stays in the heap of the GNU C library. Without prepacking, int8
convolutions would be ten times as slow for no less memory. Nothing is gained by the ORT format, which is read whole.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinprune.devices import memory_process
from kinprune.devices.runtime import package
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

    The latter leave the weights of convolutions in the file's layout and out of the arena for activations, plan no
    activations ahead, and write no scaled copy of weights. They also tell the C library of this process, where it is
    GNU's, to give freed blocks from 64 KiB back to the system, as ``MALLOC_MMAP_THRESHOLD_=65536`` would: load the
    model after that. ``threads`` is how many a session takes. Raises ExportError without ONNX Runtime.
    """
    package("onnxruntime")
    return memory_process.session_options(_settings(low_memory, threads))


def measure_memory(path: str | Path, *, threads: int = 1, runs: int = RUNS, timeout: float = 300.0) -> MemoryUse:
    """What the exported model ``path`` takes of memory while it is loaded and answers one image, ``runs`` times.

    It runs in a process of its own, which imports NumPy and ONNX Runtime, with ``session_options(low_memory=True)``,
    on Linux only. The baseline is taken after a trivial model has run. About 1 MB of the figure is of no model: pages
    of the runtime's code that the trivial one had not used.

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
    package("onnxruntime")
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
    onnx = package("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    images, logits = (helper.make_tensor_value_info(name, kind, [1, 3, 8, 8]) for name in ("images", "logits"))
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["logits"])], "trivial", [images], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())
