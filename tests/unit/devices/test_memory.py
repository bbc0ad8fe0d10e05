from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from kinprune.devices import memory, memory_process  # noqa: E402
from kinprune.devices.halving import halve  # noqa: E402
from kinprune.devices.memory import measure_memory, session_options  # noqa: E402
from kinprune.devices.onnx import export_onnx  # noqa: E402
from kinprune.errors import ExportError  # noqa: E402
from kinprune.precision import PRECISIONS, Precision  # noqa: E402
from kinprune.preprocessing import Preprocessing  # noqa: E402
from kinprune.units import Mask, UnitSpace, extract, find_units  # noqa: E402

SIDE = 64
MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": (32, 64, 128, 256)},
    "vit_tiny_patch16_224": {"img_size": SIDE, "depth": 3},
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only")


@cache
def pruned(name: str) -> tuple[nn.Module, UnitSpace, np.ndarray[Any, np.dtype[np.int64]]]:
    """A model with half of every group cut, its unit space before that, and the counts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=7, **MODELS[name]).eval()
    space = find_units(model, (SIDE, SIDE))
    kept = np.concatenate([np.arange(group.size) < max(1, group.size // 2) for group in space.groups])
    mask = Mask(kept, space.fingerprint)
    return extract(model, space, mask), space, space.counts(kept)[None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Precision], Path]:
    """``exported(name, precision)``: the pruned model's file."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def make(name: str, precision: Precision) -> Path:
        path = folder / f"{name}-{precision}.onnx"
        if precision == "fp16":  # as an export does it, from the file that is there
            model = onnx.load(make(name, "fp32"))
            halve(model)
            onnx.save(model, path)
            return path
        generator = torch.Generator().manual_seed(0)
        return export_onnx(
            pruned(name)[0],
            path,
            classes=[str(number) for number in range(7)],
            preprocessing=Preprocessing((SIDE, SIDE)),
            precision=precision,
            calibration=torch.randint(0, 256, (2, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8),
            check=False,
        ).path

    return make


def stored_bytes(path: Path) -> int:
    """Bytes of all numbers that a file holds for its weights."""
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(path).graph.initializer)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_take_the_bytes_that_are_foreseen(
    exported: Callable[[str, Precision], Path], name: str, precision: Precision
) -> None:
    _, space, counts = pruned(name)
    foreseen = int(space.costs.weight_bytes(counts, precision)[0])
    stored = stored_bytes(exported(name, precision))
    # Shapes and scales of activations are a few bytes each; batch norm, which is folded, counts.
    assert 0.97 * stored - 4096 <= foreseen <= 1.05 * stored + 4096
    assert foreseen < space.costs.weight_bytes(space.sizes[None], precision)[0]


@linux
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_is_within_what_is_foreseen(
    exported: Callable[[str, Precision], Path], name: str, precision: Precision
) -> None:
    _, space, counts = pruned(name)
    path = exported(name, precision)
    used = measure_memory(path)
    foreseen = int(space.costs.peak_memory_bytes(counts, precision)[0])
    assert stored_bytes(path) < used.peak_bytes <= foreseen <= 2 * used.peak_bytes
    assert 0 < used.loading_bytes <= used.peak_bytes
    assert 0 < used.resident_bytes <= used.peak_bytes
    assert used.baseline_bytes > 10_000_000  # Python and the runtime
    assert used.runtime == onnxruntime.__version__


@linux
def test_the_options_are_worth_it(exported: Callable[[str, Precision], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported("resnet18", "fp32")
    lean = measure_memory(path)
    monkeypatch.setattr(memory, "_LEAN", {})
    assert measure_memory(path).peak_bytes > 1.3 * lean.peak_bytes


def test_options_are_the_runtime_s_own(exported: Callable[[str, Precision], Path]) -> None:
    path = exported("vit_tiny_patch16_224", "fp32")
    lean, usual = session_options(low_memory=True, threads=1), session_options()
    assert lean.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    assert not lean.enable_mem_pattern and lean.intra_op_num_threads == 1
    assert lean.get_session_config_entry("session.use_device_allocator_for_initializers") == "1"
    assert usual.enable_mem_pattern and usual.intra_op_num_threads == onnxruntime.SessionOptions().intra_op_num_threads
    images = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE), dtype=np.float32)
    answers = [
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(
            None, {"images": images}
        )[0]
        for options in (lean, usual)
    ]
    np.testing.assert_allclose(*answers, atol=1e-4)


@linux
def test_the_process_imports_no_torch_and_nothing_of_kinprune(exported: Callable[[str, Precision], Path]) -> None:
    source = Path(memory_process.__file__).read_text(encoding="utf-8")
    asked = {
        "path": str(exported("resnet18", "fp32")),
        "trivial": base64.b64encode(memory._trivial()).decode(),
        "settings": {"intra_op_num_threads": 1},
        "runs": 1,
    }
    code = f"{source}\nprint(sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(asked), capture_output=True, text=True)
    found, modules = done.stdout.splitlines()
    assert json.loads(found)["peak"] > 0
    assert "'onnxruntime'" in modules and "'numpy'" in modules
    assert "'torch'" not in modules and "'kinprune'" not in modules and "'onnx'" not in modules


@linux
def test_without_leave_to_reset_the_peak_figures_are_no_smaller(tmp_path: Path) -> None:
    assert memory_process.reset_peak()
    assert not memory_process.reset_peak(str(tmp_path / "missing" / "clear_refs"))
    now, peak = memory_process.resident()
    assert 10_000_000 < now <= peak


@pytest.mark.skipif(os.environ.get("MALLOC_MMAP_THRESHOLD_") is not None, reason="the heap is set already")
def test_freed_blocks_go_back_to_the_system() -> None:
    source = Path(memory_process.__file__).read_text(encoding="utf-8").partition("if __name__")[0]
    code = f"{source}\nprint(give_back(65536), hasattr(ctypes.CDLL(None), 'mallopt'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    gave, can = done.stdout.split()
    assert gave == can


@linux
def test_bad_files_are_refused(tmp_path: Path, exported: Callable[[str, Precision], Path]) -> None:
    with pytest.raises(ExportError, match=r"none\.onnx is not there: give the file of an export"):
        measure_memory(tmp_path / "none.onnx")
    with pytest.raises(ExportError, match="is no file: give the file of an export"):
        measure_memory(tmp_path)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(exported("resnet18", "fp32").read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"cannot read damaged\.onnx: .*; export it again"):
        measure_memory(damaged)
    with pytest.raises(ExportError, match="runs is 0, expected at least 1"):
        measure_memory(damaged, runs=0)


@linux
def test_models_that_take_no_images_are_refused(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto.INT64
    taken, given = (helper.make_tensor_value_info(name, kind, [3]) for name in ("words", "found"))
    graph = helper.make_graph([helper.make_node("Neg", ["words"], ["found"])], "g", [taken], [given])
    path = tmp_path / "words.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    with pytest.raises(ExportError, match=r"cannot run words\.onnx: .*int64.*; export it again"):
        measure_memory(path)


def test_other_systems_are_told_that_it_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ExportError, match="cannot be measured on darwin, expected Linux"):
        measure_memory(tmp_path / "any.onnx")


@linux
def test_a_process_that_is_ended_is_told_of(exported: Callable[[str, Precision], Path]) -> None:
    path = exported("resnet18", "fp32")

    def end() -> None:
        while True:
            for child in children():
                if b"memory" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(child, signal.SIGKILL)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=end)
    killer.start()
    with pytest.raises(ExportError, match=r"was ended by signal 9: free memory"):
        measure_memory(path, runs=1_000_000)
    killer.join()
    with pytest.raises(ExportError, match=r"was not measured within 0\.05 seconds"):
        measure_memory(path, timeout=0.05)


def children() -> list[int]:
    """The processes that this one's threads have started."""
    return [
        int(child) for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
    ]


@linux
def test_a_process_that_fails_is_told_of(
    exported: Callable[[str, Precision], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libonnx is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ExportError, match="failed: ImportError: libonnx is broken; see that onnxruntime imports"):
        measure_memory(exported("resnet18", "fp32"))
