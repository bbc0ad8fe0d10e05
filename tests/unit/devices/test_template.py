from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import kinprune as kp  # noqa: E402
from kinprune.devices.noise import NOISE_FILE, Segment, write_noise  # noqa: E402
from kinprune.devices.template import Affine, learn_template  # noqa: E402
from kinprune.units import Mask  # noqa: E402

FAMILIES: dict[str, dict[str, Any]] = {
    "mobilenetv3_small_050": {},
    "densenet121": {"block_config": [2, 2], "growth_rate": 8},
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 32},
}


def shapes_of(path: Path) -> list[tuple[str, list[int]]]:
    """Every initialiser's type and shape by how it is used, whatever it is called."""
    file = onnx.load(str(path), load_external_data=False)
    held = {one.name: one for one in file.graph.initializer}
    return [
        (node.op_type, list(held[name].dims))
        for node in file.graph.node
        for name in node.input
        if name in held and held[name].data_type == onnx.TensorProto.FLOAT
    ]


@pytest.mark.parametrize(
    ("name", "stream"),
    [("mobilenetv3_small_050", False), ("densenet121", True), ("vit_tiny_patch16_224", False)],
)
def test_the_file_of_any_widths_is_what_an_export_would_be(name: str, stream: bool, tmp_path: Path) -> None:
    import timm

    model = timm.create_model(name, num_classes=4, **FAMILIES[name]).eval()
    size = (32, 32)
    head = "head" if "vit" in name else "classifier"
    space = kp.find_units(model, size, head=head, stream=stream)
    preprocessing = kp.Preprocessing(image_size=size)
    template = learn_template(model, space, preprocessing)
    write_noise(tmp_path / NOISE_FILE, template.segments.values())
    counts = np.array([int(np.random.default_rng(7).integers(1, size + 1)) for size in space.sizes])
    (tmp_path / "made.onnx").write_bytes(template.at(counts))

    kept = np.concatenate([np.arange(size) < count for size, count in zip(space.sizes, counts, strict=True)])
    small = kp.extract(model, space, Mask(kept, space.fingerprint))
    exported = kp.export_onnx(
        small, tmp_path / "exported.onnx", classes=list("abcd"), preprocessing=preprocessing, check=False
    )
    assert shapes_of(tmp_path / "made.onnx") == shapes_of(exported.path)
    for batch in (1, 3):
        session = onnxruntime.InferenceSession(str(tmp_path / "made.onnx"), providers=["CPUExecutionProvider"])
        images = np.random.default_rng(0).standard_normal((batch, 3, *size), dtype=np.float32)
        assert session.run(None, {"images": images})[0].shape == (batch, 4)


def test_the_file_has_no_weights(backbone: kp.Backbone, space: kp.UnitSpace) -> None:
    template = learn_template(backbone.model, space, backbone.preprocessing)
    weights = sum(tensor.numel() * 4 for tensor in backbone.model.parameters())
    assert len(template.at(space.sizes)) < weights / 3
    ends = sorted((one.offset, one.offset + one.count * one.itemsize) for one in template.segments.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))


def test_affine_numbers() -> None:
    assert Affine(3, ((0, 2), (2, -1))).of(np.array([5, 9, 4])) == 3 + 10 - 4


def test_noise_is_what_segments_say_and_repeats(tmp_path: Path) -> None:
    segments = [
        Segment(0, 1000, "float32", -0.5, 0.25),
        Segment(4096, 500, "int8", -127, 127),
        Segment(8192, 10, "float16", 1, 2),
    ]
    write_noise(tmp_path / "a", segments, seed=1)
    write_noise(tmp_path / "b", segments, seed=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    floats = np.fromfile(tmp_path / "a", np.float32, 1000)
    assert -0.5 <= floats.min() < floats.max() <= 0.25
    whole = np.fromfile(tmp_path / "a", np.int8, 500, offset=4096)
    assert whole.min() >= -127
    assert len(np.unique(whole)) > 150
    halves = np.fromfile(tmp_path / "a", np.float16, 10, offset=8192)
    assert 1 <= halves.min() <= halves.max() <= 2
