"""Exported files of each format: what they answer, what reading them needs, and what is not read."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import kinprune
from kinprune.devices import export_executorch, export_onnx, export_pt2, open_exported
from kinprune.errors import ExportError
from kinprune.evaluation import logits
from kinprune.preprocessing import Preprocessing

CLASSES = ("ant", "bée", "cat")
PREPROCESSING = Preprocessing((32, 32), std=(0.2, 0.21, 1 / 3), interpolation="bilinear", crop_pct=0.875)


class Windows(nn.Module):
    """A net that cuts images into parts, so that sizes depend on the batch as in a Swin."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Linear(8, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.conv(x)))
        x = x.reshape(x.shape[0], 8, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 8, 16)
        answers: Tensor = self.head(x.mean(2).view(-1, 4, 8).mean(1))
        return answers


class Branching(Windows):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def needs_executorch() -> None:
    pytest.importorskip("executorch.runtime", reason='needs ExecuTorch: pip install "kinprune[executorch]"')


def export(format: str, path: Path, model: nn.Module | None = None, **options: Any) -> Any:
    if format == "onnx":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(name)
    if format == "executorch":
        needs_executorch()
    write: dict[str, Callable[..., Any]] = {
        "onnx": export_onnx,
        "pt2": export_pt2,
        "executorch": export_executorch,
    }
    return write[format](model or Windows().eval(), path, classes=CLASSES, preprocessing=PREPROCESSING, **options)


def pixels(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(6).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


@pytest.fixture(scope="module")
def pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = export("pt2", tmp_path_factory.mktemp("pt2") / "model.pt2").path
    return path


def test_pt2_programs_hold_for_any_batch(pt2: Path) -> None:
    expected = logits(Windows(), torch.from_numpy(pixels(7)), PREPROCESSING).numpy()
    found = open_exported(pt2)
    assert found.format == "pt2" and found.metadata.classes == CLASSES
    assert found.metadata.preprocessing == PREPROCESSING and found.metadata.precision == "fp32"
    for batch_size in (1, 3, 7):
        np.testing.assert_allclose(found.logits(pixels(7), batch_size=batch_size), expected, atol=1e-5)


@pytest.mark.parametrize(("format", "suffix"), [("onnx", ".onnx"), ("executorch", ".pte")])
def test_other_formats_answer_alike(format: str, suffix: str, tmp_path: Path) -> None:
    done = export(format, tmp_path / f"model{suffix}")
    assert done.bytes == done.path.stat().st_size and done.max_difference < 1e-5
    found = open_exported(done.path)
    assert found.format == format and found.metadata.classes == CLASSES
    assert found.metadata.preprocessing == PREPROCESSING
    expected = logits(Windows(), torch.from_numpy(pixels(5)), PREPROCESSING).numpy()
    np.testing.assert_allclose(found.logits(pixels(5), batch_size=2), expected, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [done.path.name]


def test_pt2_changes_nothing_and_knows_nothing_of_this_machine(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Windows().train()
    done = export("pt2", tmp_path / "model.pt2", model)
    assert done.max_difference < 1e-5 and done.runtime == torch.__version__
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")
    with zipfile.ZipFile(done.path) as archive:
        raw = b"".join(archive.read(name) for name in archive.namelist())
    for folder in (Path(__file__).parent, Path(torch.__file__).parent, Path.home()):
        assert str(folder).encode() not in raw


@pytest.mark.parametrize("suffix", [".pt2", ".pte", ".onnx"])
def test_files_that_are_no_exports_are_refused(suffix: str, pt2: Path, tmp_path: Path) -> None:
    if suffix == ".pte":
        needs_executorch()
    path = tmp_path / f"model{suffix}"
    with pytest.raises(ExportError, match="is not there"):
        open_exported(path)
    for raw in (b"", b"no model" * 99, pt2.read_bytes()[:-100]):
        path.write_bytes(raw)
        with pytest.raises(ExportError, match=r"cannot read|damaged|does not say"):
            open_exported(path)
    with pytest.raises(ExportError, match=r"expected a name that ends in \.onnx, \.pte, \.pt2"):
        open_exported(tmp_path / "model.tar")


def altered(pt2: Path, path: Path, change: Callable[[str, bytes], bytes | None], extra: dict[str, bytes]) -> Path:
    """The archive with records changed, left out (None) or added."""
    with zipfile.ZipFile(pt2) as old, zipfile.ZipFile(path, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            raw = change(name.partition("/")[2], old.read(name))
            if raw is not None:
                new.writestr(name, raw)
        for name, raw in extra.items():
            new.writestr(f"{root}/{name}", raw)
    return path


class Spy:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_pt2_with_a_pickle_is_refused_before_anything_is_unpickled(pt2: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    poison = pickle.dumps(Spy(trace))
    legacy = io.BytesIO()
    torch.save({}, legacy)

    def pickled(name: str, raw: bytes) -> bytes:
        return raw.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("config.json") else raw

    def samples(name: str, raw: bytes) -> bytes:
        return poison if name.endswith("sample_inputs/model.pt") else raw

    def same(name: str, raw: bytes) -> bytes:
        return raw

    for change, extra in (
        (pickled, {}),
        (samples, {}),
        (same, {"data/weights/model.pt": legacy.getvalue()}),
        (same, {"data/constants/opaque_obj_0": poison}),
        (same, {"data/aotinductor/model/a.so": b"x"}),
    ):
        with pytest.raises(ExportError, match="Kinprune does not write"):
            open_exported(altered(pt2, tmp_path / "bad.pt2", change, extra))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("torch.ops.aten.conv2d.default", "torch.hub.load", "it calls 'torch.hub.load'"),
        ("Symbol(", "open('ran','w') or Symbol(", "it has the expression"),
        ('"guards_code": []', '"guards_code": ["open(1)"]', "code to be evaluated"),
        ('"metadata": {}', '"metadata": {"stack_trace": "x"}', "have metadata"),
    ],
)
def test_pt2_with_more_than_a_models_operations_is_refused(
    pt2: Path, tmp_path: Path, old: str, new: str, problem: str
) -> None:
    def change(name: str, raw: bytes) -> bytes:
        if name != "models/model.json":
            return raw
        assert old.encode() in raw
        return raw.replace(old.encode(), new.encode())

    with pytest.raises(ExportError, match=problem):
        open_exported(altered(pt2, tmp_path / "bad.pt2", change, {}))


def test_pt2_without_its_metadata_is_refused(pt2: Path, tmp_path: Path) -> None:
    for raw in (b"{}", json.dumps({"kinprune.classes": "abc"}).encode()):
        changed = altered(pt2, tmp_path / "bad.pt2", lambda name, old: raw if name.startswith("extra/") else old, {})  # noqa: B023
        with pytest.raises(ExportError, match="does not say its classes"):
            open_exported(changed)


@pytest.mark.parametrize("format", ["pt2", "executorch"])
def test_programs_that_cannot_be_kept_leave_what_was_there(format: str, tmp_path: Path) -> None:
    suffix = {"pt2": ".pt2", "executorch": ".pte"}[format]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"of before")
    if format == "executorch":
        needs_executorch()
    with pytest.raises(ExportError, match="PyTorch cannot export the model"):
        export(format, path, Branching())
    with pytest.raises(ExportError, match=f"does not end in {suffix}"):
        export(format, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="2 classes are given, but the model makes 3 logits"):
        (export_pt2 if format == "pt2" else export_executorch)(
            Windows(), path, classes=("a", "b"), preprocessing=PREPROCESSING
        )
    assert path.read_bytes() == b"of before" and [other.name for other in tmp_path.iterdir()] == [path.name]


class Deviating(Windows):
    def forward(self, x: Tensor) -> Tensor:
        answers = super().forward(x)
        return answers * 1.01 if torch.compiler.is_exporting() else answers


def test_a_program_that_answers_otherwise_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"answers otherwise than PyTorch by 0\.0\d+, expected at most 0\.0001"):
        export("pt2", tmp_path / "model.pt2", Deviating())
    assert list(tmp_path.iterdir()) == []
    assert export("pt2", tmp_path / "model.pt2", Deviating(), tolerance=0.1).max_difference == pytest.approx(0.01, 0.3)


def test_without_executorch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(ExportError, match=r"pip install \"kinprune\[executorch\]\""):
        export_executorch(Windows(), tmp_path / "model.pte", classes=CLASSES, preprocessing=PREPROCESSING)
    (tmp_path / "model.pte").write_bytes(b"a program")
    with pytest.raises(ExportError, match=r"pip install \"kinprune\[executorch\]\""):
        open_exported(tmp_path / "model.pte")


def test_an_onnx_file_is_run_without_pytorch(tmp_path: Path) -> None:
    path = export("onnx", tmp_path / "model.onnx", check=False).path
    program = (
        "import sys, numpy\n"
        "for name in ('torch', 'timm', 'torchvision', 'safetensors', 'onnx'):\n"
        "    sys.modules[name] = None\n"
        "from kinprune.devices import open_exported, predict_onnx, read_metadata\n"
        "images = numpy.zeros((2, 3, 32, 32), dtype=numpy.uint8)\n"
        f"path = {str(path)!r}\n"
        "assert predict_onnx(path, images).shape == open_exported(path).logits(images).shape == (2, 3)\n"
        "print(*read_metadata(path).classes)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(kinprune.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ant bée cat\n"
