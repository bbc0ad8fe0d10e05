from __future__ import annotations

import copy
import logging
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from kinprune.artifact import Artifact, load, save  # noqa: E402
from kinprune.backbones import BackboneSpec, find_classifier, fingerprint  # noqa: E402
from kinprune.backbones.spec import build_model  # noqa: E402
from kinprune.devices import OnnxExport, OnnxMetadata, export_onnx, predict_onnx, read_metadata  # noqa: E402
from kinprune.errors import ExportError  # noqa: E402
from kinprune.evaluation import logits  # noqa: E402
from kinprune.preprocessing import Preprocessing  # noqa: E402
from kinprune.units import Mask, attributes_of, extract, find_units  # noqa: E402

CLASSES = ("ant", "bée", "cat")
PREPROCESSING = Preprocessing((32, 32), std=(0.2, 0.21, 1 / 3), interpolation="bilinear", crop_pct=0.875)
FAMILIES: dict[str, dict[str, Any]] = {
    "mobilenetv3_small_050": {},
    "regnetx_002": {},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [16, 16, 24, 32]},
    "vit_tiny_patch16_224": {"img_size": [32, 32], "depth": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": [32, 32],
        "window_size": 4,
        "depths": [2, 2],
        "num_heads": [3, 6],
        "embed_dim": 48,
    },
}


@cache
def artifact_of(name: str) -> Artifact:
    """A model with half of every group cut at random, the stream's included."""
    arguments = FAMILIES[name]
    model = build_model(name, arguments, len(CLASSES), seed=1)
    spec = BackboneSpec(name, arguments, len(CLASSES), find_classifier(model))
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = torch.randn(module.num_features, generator=generator) / 10
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    nn.init.normal_(model.get_parameter(f"{spec.head}.weight"), generator=generator)
    space = find_units(model, PREPROCESSING.image_size, stream=True, head=spec.head)
    random, kept = np.random.default_rng(3), np.zeros(len(space), dtype=bool)
    for part in space.split(kept):
        part[random.choice(len(part), max(1, len(part) // 2), replace=False)] = True
    return Artifact(
        extract(model, space, Mask(kept, space.fingerprint)),
        spec,
        PREPROCESSING,
        CLASSES,
        kept={g.name: np.flatnonzero(part).tolist() for g, part in zip(space.groups, space.split(kept), strict=True)},
        group_sizes={group.name: group.size for group in space.groups},
        kinds={group.name: group.kind for group in space.groups},
        backbone_fingerprint=fingerprint(model, spec, PREPROCESSING),
        space_fingerprint=space.fingerprint,
        attributes=attributes_of(space, space.counts(kept).tolist()),
    )


class Small(nn.Module):
    """What exports in a moment."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU6(inplace=True), nn.Linear(4, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor = self.head(self.act(self.conv(x)).mean((2, 3)))
        return answers


class Deviating(Small):
    def forward(self, x: Tensor) -> Tensor:
        answers = super().forward(x)
        return answers * 1.01 if torch.compiler.is_exporting() else answers


class Branching(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def export(path: Path, model: nn.Module | None = None, **options: Any) -> OnnxExport:
    return export_onnx(model or Small(), path, classes=CLASSES, preprocessing=PREPROCESSING, **options)


def pixels(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(6).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("onnx") / "small.onnx").path


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_models_answer_alike_for_any_batch(name: str, tmp_path: Path) -> None:
    artifact = artifact_of(name)
    done = export_onnx(load(save(artifact, tmp_path / "artifact")), tmp_path / "model.onnx")
    assert done.max_difference is not None and done.max_difference < 1e-5
    assert done.opset == 20
    assert done.runtime == onnxruntime.__version__
    assert done.bytes == done.path.stat().st_size
    images = pixels(7)
    expected = logits(artifact.model, torch.from_numpy(images), PREPROCESSING).numpy()
    assert np.abs(expected).max() > 0.1
    for batch_size in (1, 3, 7):
        found = predict_onnx(done.path, images, batch_size=batch_size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "model.onnx"]


def test_the_file_is_valid_and_says_what_it_takes(exported: Path) -> None:
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    (image,), (answer,) = model.graph.input, model.graph.output
    assert (image.name, answer.name) == ("images", "logits")
    sides = [side.dim_param or side.dim_value for side in image.type.tensor_type.shape.dim]
    assert sides == ["batch", 3, 32, 32]
    assert image.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert {entry.key for entry in model.metadata_props} == {
        "kinprune.classes",
        "kinprune.precision",
        "kinprune.preprocessing",
        "kinprune.version",
    }


def test_the_file_knows_nothing_of_this_machine(exported: Path) -> None:
    raw = exported.read_bytes()
    for folder in (Path(__file__).parent, Path(torch.__file__).parent, Path.home()):
        assert str(folder).encode() not in raw
    assert b"site-packages" not in raw


def test_metadata_comes_back(exported: Path) -> None:
    found = read_metadata(exported)
    assert found == OnnxMetadata(CLASSES, PREPROCESSING, found.version)
    assert found.version


def test_exports_are_the_same_each_time(exported: Path, tmp_path: Path) -> None:
    assert export(tmp_path / "again.onnx").path.read_bytes() == exported.read_bytes()


def test_an_export_is_quiet_and_changes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = Small().train()
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(tmp_path / "model.onnx", model)
    assert capfd.readouterr() == ("", "")
    assert model.training and model.act.training and model.act.inplace
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert levels == {name: logging.getLogger(name).level for name in levels}


def test_a_double_precision_model_is_exported_in_single(tmp_path: Path) -> None:
    done = export(tmp_path / "model.onnx", Small().double())
    np.testing.assert_allclose(
        predict_onnx(done.path, pixels(2)),
        logits(Small(), torch.from_numpy(pixels(2)), PREPROCESSING).numpy(),
        atol=1e-5,
    )


@pytest.mark.parametrize("opset", [18, 22])
def test_other_opsets(tmp_path: Path, opset: int) -> None:
    done = export(tmp_path / "model.onnx", opset=opset)
    assert done.opset == opset
    assert {entry.domain: entry.version for entry in onnx.load(done.path).opset_import}[""] == opset


def test_without_a_check_there_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = export(tmp_path / "model.onnx", check=False)
    assert done.max_difference is None and done.runtime is None
    assert done.path.is_file()


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = pytest.importorskip("torch.onnx._internal.exporter._onnx_program")
    monkeypatch.setattr(program, "_LARGE_MODEL_THRESHOLD", 16)
    done = export(tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert done.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert predict_onnx(done.path, pixels(2)).shape == (2, 3)


def test_a_model_that_answers_otherwise_is_not_kept(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"answers otherwise than PyTorch by 0\.0\d+, expected at most 0\.0001"):
        export(path, Deviating())
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(exported.read_bytes())
    with pytest.raises(ExportError, match="answers otherwise"):
        export(path, Deviating())
    assert path.read_bytes() == exported.read_bytes()
    assert [other.name for other in tmp_path.iterdir()] == ["model.onnx"]
    assert export(path, Deviating(), tolerance=0.1).max_difference == pytest.approx(0.01, rel=0.3)


def test_a_model_that_cannot_be_exported_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match="PyTorch cannot export the model to ONNX"):
        export(tmp_path / "model.onnx", Branching())
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"'{package}'.*pip install \"kinprune\[onnx\]\""):
        export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_paths_are_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    for path, problem in {
        tmp_path / "model": r"does not end in \.onnx",
        tmp_path / "folder.onnx": "is a folder",
        tmp_path / "nowhere" / "model.onnx": "is not there",
    }.items():
        with pytest.raises(ExportError, match=problem):
            export(path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match="without its classes or preprocessing"):
        export_onnx(Small(), path)
    with pytest.raises(ExportError, match="2 classes are given, but the model makes 3 logits"):
        export_onnx(Small(), path, classes=("a", "b"), preprocessing=PREPROCESSING)
    with pytest.raises(ExportError, match="does not run on images"):
        export_onnx(Small(), path, classes=CLASSES, preprocessing=Preprocessing((1, 1)))
    with pytest.raises(ExportError, match="gives no logits"):
        export(path, nn.Conv2d(3, 3, 1))
    for opset in (17, 99):
        with pytest.raises(ExportError, match=f"opset is {opset}, expected 18 to"):
            export(path, opset=opset)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 3, 32, 32), dtype=np.float32),
        np.zeros((2, 3, 32, 31), dtype=np.uint8),
        np.zeros((2, 32, 32, 3), dtype=np.uint8),
        np.zeros((3, 32, 32), dtype=np.uint8),
        np.zeros((0, 3, 32, 32), dtype=np.uint8),
    ],
    ids=lambda images: f"{images.dtype}{list(images.shape)}",
)
def test_unfit_images_are_refused(exported: Path, images: Any) -> None:
    with pytest.raises(ExportError, match=r"expected uint8 \[n, 3, 32, 32\]"):
        predict_onnx(exported, images)


def test_files_that_are_no_exports_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not there"):
        read_metadata(tmp_path / "model.onnx")
    for raw in (b"", b"no model", exported.read_bytes()[:-40]):
        (tmp_path / "model.onnx").write_bytes(raw)
        with pytest.raises(ExportError, match=r"cannot read model\.onnx|does not say"):
            predict_onnx(tmp_path / "model.onnx", pixels(1))
    model = onnx.load(exported)
    for key, value in (("kinprune.classes", "{"), ("kinprune.preprocessing", '{"image_size": 0}')):
        altered = copy.deepcopy(model)
        for entry in altered.metadata_props:
            entry.value = value if entry.key == key else entry.value
        onnx.save(altered, tmp_path / "model.onnx")
        with pytest.raises(ExportError, match="does not say its classes and preprocessing"):
            read_metadata(tmp_path / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="export it with Kinprune"):
        read_metadata(tmp_path / "model.onnx")
