"""ONNX in fp16 and int8: what it answers, what it weighs, what is refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
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

from kinprune.backbones.spec import build_model  # noqa: E402
from kinprune.devices import evaluate_exported, export_onnx, predict_onnx, read_metadata  # noqa: E402
from kinprune.errors import ExportError, TaskError  # noqa: E402
from kinprune.evaluation import evaluate, logits  # noqa: E402
from kinprune.precision import Precision  # noqa: E402
from kinprune.preprocessing import Preprocessing  # noqa: E402
from kinprune.tasks import Split  # noqa: E402

CLASSES = ("ant", "bee", "cat")
PREPROCESSING = Preprocessing((32, 32), mean=(0.4, 0.5, 0.3), std=(0.2, 0.21, 0.3))


class Cnn(nn.Module):
    """A stem, a depthwise layer behind a ReLU6, an addition and a classifier: what a MobileNet is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 16, 3, stride=2), nn.ReLU6()
        self.depthwise, self.point = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.wide, self.head = nn.Conv2d(16, 64, 3, stride=2), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = x + self.point(self.act(self.depthwise(x)))
        answers: Tensor = self.head(self.act(self.wide(x)).mean((2, 3)))
        return answers


class Faint(nn.Module):
    """All that tells images apart is a thousandth of what eight bits can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 5), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)
        with torch.no_grad():
            self.first.weight.mul_(1e-4)
            self.first.bias.fill_(100)  # type: ignore[union-attr]
            self.second.weight.sub_(self.second.weight.mean((1, 2, 3), keepdim=True)).mul_(1e4)

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor = self.head(self.second(self.first(x)).mean((2, 3)))
        return answers


def centred(model: nn.Module, head: nn.Linear, images: Tensor) -> nn.Module:
    """The model with logits that lie around 0 for every class, so that its answers differ."""
    with torch.no_grad():
        found = logits(model, images, PREPROCESSING)
        scale = found.std(dim=0).clamp(min=1e-9)
        head.weight.div_(scale[:, None])
        head.bias.sub_(found.mean(dim=0)).div_(scale)
    return model.eval()


@pytest.fixture(scope="module")
def images(make_pixels: Callable[..., NDArray[np.uint8]]) -> Tensor:
    """Thirty images of each class, class by class, as folders give them."""
    drawn = [make_pixels(name, number, 32) for name in CLASSES for number in range(30)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def models(images: Tensor) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    cnn = Cnn()
    vit = build_model("vit_tiny_patch16_224", {"img_size": [32, 32], "depth": 2, "embed_dim": 48}, 3, seed=1)
    return {"cnn": centred(cnn, cnn.head, images), "vit": centred(vit, vit.head, images)}  # type: ignore[arg-type]


def export(path: Path, model: nn.Module, precision: Precision, images: Tensor | None = None, **options: Any) -> Any:
    return export_onnx(
        model,
        path,
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        precision=precision,
        calibration=images,
        **options,
    )


@pytest.mark.parametrize("family", ["cnn", "vit"])
def test_int8_answers_as_the_model_does_for_any_batch(
    models: dict[str, nn.Module], images: Tensor, family: str, tmp_path: Path
) -> None:
    whole = export(tmp_path / "whole.onnx", models[family], "fp32")
    done = export(tmp_path / "model.onnx", models[family], "int8", images)
    assert done.precision == "int8" and done.path.stat().st_size == done.bytes < 0.5 * whole.bytes
    assert done.agreement.images == len(images) and done.agreement.by_chance < 0.6
    assert done.agreement.share >= 0.9 and done.agreement.mean_difference < 0.1
    found = read_metadata(done.path)
    assert (found.precision, found.classes, found.preprocessing) == ("int8", CLASSES, PREPROCESSING)
    fresh = images.flip(3).numpy()  # calibration has not seen these
    expected = logits(models[family], torch.from_numpy(fresh), PREPROCESSING).numpy()
    together = predict_onnx(done.path, fresh)
    assert np.mean(together.argmax(1) == expected.argmax(1)) >= 0.85
    for batch_size in (1, 7):
        np.testing.assert_allclose(predict_onnx(done.path, fresh, batch_size=batch_size), together, atol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "whole.onnx"]


@pytest.mark.parametrize("family", ["cnn", "vit"])
def test_what_is_in_eight_bits_and_what_is_not(
    models: dict[str, nn.Module], images: Tensor, family: str, tmp_path: Path
) -> None:
    model = onnx.load(export(tmp_path / "model.onnx", models[family], "int8", images, check=False).path)
    onnx.checker.check_model(model, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    in_bytes = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            source = makers.get(node.input[1])
            stored = source is not None and source.op_type == "DequantizeLinear" and source.input[0] in types
            in_bytes.append(stored and types[source.input[0]] == onnx.TensorProto.INT8)  # type: ignore[union-attr]
    assert not in_bytes[-1]  # the classifier
    # The cnn's four convolutions; the ViT's patches and four products a block, but neither of attention's two.
    assert sum(in_bytes) == {"cnn": 4, "vit": 1 + 2 * 4}[family]
    assert len(in_bytes) == {"cnn": 5, "vit": 1 + 2 * 6 + 1}[family]


def test_int8_without_a_check_has_the_same_operations_whatever_the_weights(images: Tensor, tmp_path: Path) -> None:
    kinds = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        done = export(tmp_path / "model.onnx", Cnn(), "int8", images[:8], check=False)
        assert done.max_difference is None
        kinds.append([node.op_type for node in onnx.load(done.path).graph.node])
    assert kinds[0] == kinds[1]


def test_int8_is_the_same_each_time(models: dict[str, nn.Module], images: Tensor, tmp_path: Path) -> None:
    first, again = (export(tmp_path / name, models["cnn"], "int8", images) for name in ("a.onnx", "b.onnx"))
    assert first.path.read_bytes() == again.path.read_bytes()


def test_shifts_of_rounded_weights_are_taken_back(
    models: dict[str, nn.Module], images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_correction = export(tmp_path / "a.onnx", models["cnn"], "int8", images).agreement
    monkeypatch.setattr("kinprune.devices.quantising.correct_biases", lambda *given: None)
    without = export(tmp_path / "b.onnx", models["cnn"], "int8", images).agreement
    assert with_correction.mean_difference < 0.9 * without.mean_difference


@pytest.mark.parametrize("family", ["cnn", "vit"])
def test_fp16_halves_the_file_and_moves_the_logits_little(
    models: dict[str, nn.Module], images: Tensor, family: str, tmp_path: Path
) -> None:
    whole, half = (export(tmp_path / f"{name}.onnx", models[family], name) for name in ("fp32", "fp16"))
    assert half.bytes < 0.75 * whole.bytes
    assert 0 < half.max_difference < 5e-3
    assert read_metadata(half.path).precision == "fp16"
    onnx.checker.check_model(onnx.load(half.path), full_check=True)
    np.testing.assert_allclose(
        predict_onnx(half.path, images.numpy()), logits(models[family], images, PREPROCESSING).numpy(), atol=0.02
    )


def test_weights_that_half_precision_cannot_hold_stay_as_they_are(tmp_path: Path) -> None:
    model = Cnn()
    with torch.no_grad():
        model.wide.weight[0, 0, 0, 0] = 1e6
    done = export(tmp_path / "model.onnx", model, "fp16")
    kept = [tensor for tensor in onnx.load(done.path).graph.initializer if list(tensor.dims) == [64, 16, 3, 3]]
    assert [tensor.data_type for tensor in kept] == [onnx.TensorProto.FLOAT]


def test_fp16_has_a_tolerance_of_its_own(models: dict[str, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"answers otherwise than PyTorch by .* expected at most 1e-06"):
        export(tmp_path / "model.onnx", models["cnn"], "fp16", tolerance=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_says_no_precision_is_in_fp32(models: dict[str, nn.Module], tmp_path: Path) -> None:
    path = export(tmp_path / "model.onnx", models["cnn"], "fp32").path
    model = onnx.load(path)
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != "kinprune.precision"}
    onnx.helper.set_model_props(model, kept)
    onnx.save(model, path)
    assert read_metadata(path).precision == "fp32"
    onnx.helper.set_model_props(model, kept | {"kinprune.precision": "int3"})
    onnx.save(model, path)
    with pytest.raises(ExportError, match="export it with Kinprune"):
        read_metadata(path)


def test_int8_of_no_use_is_refused_and_leaves_what_was_there(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(3)
    faint = Faint()
    model = centred(faint, faint.head, images)
    (tmp_path / "model.onnx").write_bytes(b"of before")
    with pytest.raises(ExportError, match=r"in int8 only \d+% of 90 calibration images.*by chance"):
        export(tmp_path / "model.onnx", model, "int8", images)
    assert (tmp_path / "model.onnx").read_bytes() == b"of before"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (None, "int8 needs images to calibrate on"),
        (torch.zeros(4, 3, 32, 32), r"the images are float32 \[4, 3, 32, 32\], expected uint8"),
        (torch.zeros(4, 3, 32, 31, dtype=torch.uint8), r"expected uint8 \[n, 3, 32, 32\]"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), r"expected uint8 \[n, 3, 32, 32\]"),
    ],
    ids=["none", "floats", "size", "empty"],
)
def test_calibration_is_checked_before_work(given: Tensor | None, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=problem):
        export(tmp_path / "model.onnx", Cnn(), "int8", given)
    assert list(tmp_path.iterdir()) == []


def test_other_precisions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no precision 'int4', expected one of fp32, fp16, int8"):
        export(tmp_path / "model.onnx", Cnn(), "int4")  # type: ignore[arg-type]


def test_int8_is_quiet_and_leaves_logging_alone(
    models: dict[str, nn.Module], images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(tmp_path / "model.onnx", models["vit"], "int8", images)
    assert capfd.readouterr() == ("", "")
    assert (root.level, list(root.handlers)) == before


def test_an_exported_file_is_evaluated_as_its_model_is(
    models: dict[str, nn.Module], images: Tensor, tmp_path: Path
) -> None:
    path = export(tmp_path / "model.onnx", models["cnn"], "fp32").path
    split = Split(images, torch.arange(3).repeat_interleave(30))
    found, expected = evaluate_exported(path, split), evaluate(models["cnn"], split, PREPROCESSING)
    assert found.confusion.tolist() == expected.confusion.tolist() and found.accuracy == expected.accuracy
    assert found.loss == pytest.approx(expected.loss, abs=1e-4)
    with pytest.raises(TaskError, match="labels run from 3 to 3"):
        evaluate_exported(path, Split(images[:1], torch.tensor([3])))
