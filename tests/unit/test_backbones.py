"""Backbones: real weights load as timm loads them, and whatever cannot be used is refused with a reason."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kinprune.backbones import Backbone, BackboneSpec, build_architecture, find_classifier, load_backbone
from kinprune.errors import BackboneError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shared_weights(shared: Path, name: str) -> Path:
    path = shared / "weights" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no pre-trained weights {path.name} in {path.parent}")
    return path


def saved(path: Path, name: str = "resnet10t", metadata: dict[str, str] | None = None, **change: Tensor | None) -> Path:
    """A file with the weights of a newly initialised timm model of 5 classes, tensors in ``change`` changed."""
    tensors = dict(timm.create_model(name, num_classes=5).state_dict())
    for key, value in change.items():
        tensors.pop(key.replace("__", "."), None)
        if value is not None:
            tensors[key.replace("__", ".")] = value
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def logits(backbone: Backbone, model: nn.Module | None = None) -> Tensor:
    images = torch.randn(2, 3, *backbone.preprocessing.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = (model or backbone.model)(images)
    assert isinstance(output, Tensor)
    return output


def refused(*arguments: object, **keywords: object) -> str:
    with pytest.raises(BackboneError) as caught:
        load_backbone(*arguments, **{"num_classes": 5, **keywords})  # type: ignore[arg-type]
    return str(caught.value)


# --- real weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name", "classes", "size"),
    [
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224", 1000, 224),
        ("mobilenetv2_100", "mobilenetv2_100", 1000, 224),
        ("resnet18_tinyimagenet64", "resnet18", 200, 64),
    ],
)
def test_real_weights_answer_as_timm_does(shared: Path, file: str, name: str, classes: int, size: int) -> None:
    path = shared_weights(shared, file)
    backbone = load_backbone(name, num_classes=classes, weights=path)
    plain = timm.create_model(name, num_classes=classes).eval()
    plain.load_state_dict(load_file(path))
    assert backbone.preprocessing.image_size == (size, size)
    assert torch.equal(logits(backbone), logits(backbone, plain))
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}
    fewer = load_backbone(name, num_classes=7, weights=path)
    assert logits(fewer).shape == (2, 7)
    assert fewer.fingerprint == backbone.fingerprint


def test_real_transformer_is_resampled_to_smaller_images(shared: Path) -> None:
    path = shared_weights(shared, "vit_tiny_patch16_224")
    backbone = load_backbone("vit_tiny_patch16_224", num_classes=1000, weights=path, image_size=112)
    reference = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    reference.load_state_dict(load_file(path))
    assert backbone.spec.arguments == {"img_size": [112, 112]}
    assert torch.isfinite(logits(backbone)).all()
    # timm's own resampling at run time, which interpolates alike, is the independent answer
    assert torch.allclose(logits(backbone), logits(backbone, reference), atol=1e-4)


def test_preprocessing_comes_from_the_file_before_timm_and_from_arguments_before_both(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "w.safetensors", metadata={"mean": "0.1 0.2 0.3", "input_size": "3 64 96", "crop_pct": ".9"}
    )
    own = load_backbone("resnet10t", num_classes=5, random=True).preprocessing
    expected = timm.data.resolve_model_data_config(timm.create_model("resnet10t"))
    assert (3, *own.image_size) == expected["input_size"]
    assert (own.mean, own.std, own.interpolation, own.crop_pct) == tuple(
        expected[key] for key in ("mean", "std", "interpolation", "crop_pct")
    )
    from_file = load_backbone("resnet10t", num_classes=5, weights=path).preprocessing
    assert (from_file.mean, from_file.std) == ((0.1, 0.2, 0.3), own.std)
    assert (from_file.image_size, from_file.crop_pct) == ((64, 96), 0.9)
    given = load_backbone("resnet10t", num_classes=5, weights=path, image_size=32, mean=(0, 0, 0)).preprocessing
    assert (given.image_size, given.mean, given.crop_pct) == ((32, 32), (0.0, 0.0, 0.0), 0.9)


# --- weights in files -------------------------------------------------------------------------------------------


def test_file_without_classifier_gets_a_new_one(tmp_path: Path) -> None:
    headless = saved(tmp_path / "w.safetensors", fc__weight=None, fc__bias=None)
    first, second = (load_backbone("resnet10t", num_classes=5, weights=headless, seed=seed) for seed in (0, 1))
    assert not torch.equal(logits(first), logits(second))
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    ("name", "size", "resampled"),
    [
        ("test_vit", (96, 128), "pos_embed"),
        ("swin_tiny_patch4_window7_224", (128, 128), "layers.3.blocks.0.attn.relative_position_bias_table"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:timm.*")  # of torch, about how timm interpolates Swin's tables
def test_positions_are_resampled(tmp_path: Path, name: str, size: tuple[int, int], resampled: str) -> None:
    path = saved(tmp_path / "w.safetensors", name)
    backbone = load_backbone(name, num_classes=5, weights=path, image_size=size)
    assert backbone.model.state_dict()[resampled].shape != load_file(path)[resampled].shape
    assert torch.isfinite(logits(backbone)).all()


def test_half_precision_becomes_single_precision(tmp_path: Path) -> None:
    tensors = timm.create_model("test_resnet", num_classes=5).half().state_dict()
    save_file(tensors, tmp_path / "half.safetensors")
    backbone = load_backbone("test_resnet", num_classes=5, weights=tmp_path / "half.safetensors")
    loaded = backbone.model.state_dict()
    assert all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in tensors.items())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32, torch.int64}


def test_files_of_another_model_are_refused_naming_the_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", conv1__0__weight=torch.zeros(24, 3, 5, 5))
    assert "'conv1.0.weight' is 24x3x5x5, expected 24x3x3x3" in refused("resnet10t", weights=path)
    message = refused("resnet10t", weights=saved(tmp_path / "w.safetensors", bn1__bias=None, extra=torch.zeros(1)))
    assert "1 missing ('bn1.bias'); 1 unexpected ('extra')" in message
    message = refused("test_vit", weights=saved(tmp_path / "w.safetensors", "test_resnet"))
    assert "w.safetensors does not fit 'test_vit'" in message
    wide = saved(tmp_path / "w.safetensors", fc__weight=torch.zeros(7, 3))
    assert "'fc.weight' is 7x3, expected 5x512" in refused("resnet10t", weights=wide)
    quantised = saved(tmp_path / "w.safetensors", bn1__weight=torch.ones(32, dtype=torch.int8))
    assert "'bn1.weight' is torch.int8" in refused("resnet10t", weights=quantised)
    poisoned = saved(tmp_path / "w.safetensors", bn1__weight=torch.full((32,), torch.nan))
    assert "'bn1.weight' holds NaN" in refused("resnet10t", weights=poisoned)


def test_files_of_another_format_are_refused(tmp_path: Path) -> None:
    good = saved(tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.safetensors").write_text("not weights at all, only some text")
    (tmp_path / "none.safetensors").write_bytes(b"")
    for name in ("cut", "text", "none"):
        message = refused("resnet10t", weights=tmp_path / f"{name}.safetensors")
        assert f"{name}.safetensors is no safetensors file, or a damaged one" in message
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds no tensors" in refused("resnet10t", weights=tmp_path / "empty.safetensors")
    assert "does not exist" in refused("resnet10t", weights=tmp_path / "gone.safetensors")
    assert "is a folder" in refused("resnet10t", weights=tmp_path)
    for suffix in ("pth", "pt", "bin"):
        (tmp_path / f"w.{suffix}").write_bytes(b"\x80\x04")
        message = refused("resnet10t", weights=tmp_path / f"w.{suffix}")
        assert "is a pickle" in message
        assert "safetensors.torch.save_file" in message
    (tmp_path / "w.npz").write_bytes(b"PK")
    assert "ends in '.npz', expected a .safetensors file" in refused("resnet10t", weights=tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"architecture": "resnet34.a1"}, "says it holds weights of 'resnet34.a1', not of 'resnet10t'"),
        ({"mean": "0.5 half 0.5"}, "mean = '0.5 half 0.5', expected three numbers"),
        ({"std": "0.5 0.5"}, "std = '0.5 0.5', expected three numbers"),
        ({"std": "0.5 0 0.5"}, "std is (0.5, 0.0, 0.5), expected three positive numbers"),
        ({"input_size": "1 64 64"}, "input_size = '1 64 64', expected channels, height and width"),
        ({"num_classes": "12"}, "says 12 classes, its classifier 'fc' has 5"),
        ({"interpolation": "lanczos"}, "'lanczos', expected one of nearest, bilinear, bicubic"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    assert message in refused("resnet10t", weights=saved(tmp_path / "w.safetensors", metadata=metadata))


# --- random and published weights -------------------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (load_backbone("test_vit", num_classes=5, random=True, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(first), logits(second))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != other.fingerprint
    resized = load_backbone("test_vit", num_classes=5, random=True, seed=3, mean=(0.4, 0.4, 0.4))
    assert resized.fingerprint != first.fingerprint


def test_no_network_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("resnet10t")
    assert "cannot be reached" in message
    assert "--weights" in message
    assert "--random" in message


def test_models_without_safe_weights_are_refused() -> None:
    assert "only as a pickle" in refused("gcvit_tiny")
    unpublished = refused("resnetblur18")
    assert "publishes no pre-trained weights of 'resnetblur18'" in unpublished
    assert "--random" in unpublished


def test_published_weights_are_downloaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = saved(tmp_path / "w.safetensors", "test_resnet").read_bytes()
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/" or self.path.endswith("model.safetensors") else 404)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"1"')
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        first = load_backbone("test_resnet", num_classes=5)
        server.shutdown()
    assert any(path.startswith("/timm/test_resnet.") for path in asked)
    before = len(asked)
    again = load_backbone("test_resnet", num_classes=5)
    assert (len(asked), again.fingerprint) == (before, first.fingerprint)
    local = load_backbone("test_resnet", num_classes=5, weights=tmp_path / "w.safetensors")
    assert local.fingerprint == first.fingerprint


# --- names, sizes and other arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("resnet19", {}, "timm has no model 'resnet19'. Did you mean 'resnet18'"),
        ("resnet18.best", {}, "no pre-trained tag 'best' of 'resnet18'; known are 'resnet18.a1_in1k'"),
        ("vit_tiny_patch16_224_in21k", {}, "retired the name 'vit_tiny_patch16_224_in21k'; use vit_tiny_patch16_224"),
        ("hf-hub:timm/resnet18", {}, "neither a timm model name nor 'module:factory'"),
        ("deit_tiny_distilled_patch16_224", {}, "more than one head (head, head_dist)"),
        (
            "test_vit",
            {"image_size": 100},
            "100x100 is not a whole number of patches of 16x16 pixels: use 96x96 or 112x112",
        ),
        ("test_resnet", {"image_size": 16}, "16x16 is too small, expected at least 32 pixels"),
        ("inception_v3", {"image_size": 32}, "InceptionV3 does not run on one image of 3x32x32"),
        ("test_maxvit", {"image_size": 100}, "does not run on one image of 3x100x100"),
        ("test_resnet", {"image_size": (64, 64, 3)}, "image size is (64, 64, 3), expected pixels"),
        ("test_resnet", {"image_size": -1}, "image size is -1"),
        ("test_resnet", {"mean": (0.5, 0.5)}, "mean is (0.5, 0.5), expected three numbers"),
        ("test_resnet", {"std": (0, 1, 1)}, "std is (0, 1, 1), expected three positive numbers"),
        ("test_resnet", {"crop_pct": 1.5}, "crop_pct is 1.5"),
        ("test_resnet", {"num_classes": 0}, "num_classes is 0, expected a whole number of at least 1"),
        ("test_resnet", {"weights": "w.safetensors"}, "Both weights and random are given"),
    ],
)
def test_bad_arguments_are_refused(name: str, keywords: dict[str, object], message: str) -> None:
    assert message in refused(name, random=True, **keywords)


def test_tag_and_rectangular_images() -> None:
    backbone = load_backbone("test_vit.r160_in1k", num_classes=5, random=True, image_size=(64, 96))
    assert (backbone.spec.architecture, backbone.preprocessing.image_size) == ("test_vit", (64, 96))
    assert logits(backbone).shape == (2, 5)


# --- architectures and classifiers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["test_vit", "resnet10t", "test_efficientnet", "vitamin_small_224", "swin_tiny_patch4_window7_224"]
)
def test_architecture_is_built_without_weights_and_takes_them(name: str) -> None:
    backbone = load_backbone(name, num_classes=5, random=True)
    empty = build_architecture(backbone.spec)
    assert not any(buffer.is_meta for buffer in empty.buffers())
    empty.load_state_dict(backbone.model.state_dict(), assign=True)
    assert not empty.training
    assert torch.equal(logits(backbone, empty), logits(backbone))


def test_architecture_allocates_no_parameters() -> None:
    empty = build_architecture(BackboneSpec("resnet50", {}, 5, "fc"))
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize(
    ("name", "head"), [("resnet10t", "fc"), ("test_vit", "head"), ("test_convnext", "head.fc"), ("dla34", "fc")]
)
def test_classifier_is_found_declared_or_not(name: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(name, num_classes=5)
    assert find_classifier(model) == head
    monkeypatch.delattr(type(model), "get_classifier")
    size = timm.data.resolve_model_data_config(model)["input_size"][1:]
    assert find_classifier(model, size) == head
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "expected exactly ['arguments', 'head', 'name', 'num_classes']"),
        ({"name": 3}, "'name' of a backbone spec is 3, expected a value of type str"),
        ({"num_classes": True}, "'num_classes' of a backbone spec is True"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"arguments": {"checkpoint_path": "w.pth"}}, "must not set 'checkpoint_path'"),
        ({"arguments": {"img_size": {}}}, "Argument 'img_size' of a backbone spec is {}"),
    ],
)
def test_specs_are_read_strictly(change: dict[str, object], message: str) -> None:
    good = BackboneSpec("test_vit", {"img_size": [64, 64]}, 5, "head")
    assert BackboneSpec.from_json(good.to_json()) == good
    with pytest.raises(BackboneError) as caught:
        BackboneSpec.from_json({**good.to_json(), **change})
    assert message in str(caught.value)


def test_specs_name_layers_that_exist() -> None:
    with pytest.raises(BackboneError, match="has no layer 'top' to be its head"):
        build_architecture(BackboneSpec("test_vit", {}, 5, "top"))
    with pytest.raises(BackboneError, match="timm cannot build 'test_vit'"):
        build_architecture(BackboneSpec("test_vit", {"colour": "red"}, 5, "head"))
