"""Backbones from a user's own ``module:factory``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kinprune.backbones import Backbone, BackboneSpec, build_architecture, load_backbone
from kinprune.errors import BackboneError

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, conv=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.early = nn.Linear(8, 8)
        self.last = nn.Conv2d(8, classes, 1) if conv else nn.Linear(8, classes)
        self.conv = conv

    def forward(self, x):
        x = self.early(self.stem(x).relu().mean((2, 3)))
        return self.last(x[:, :, None, None]).flatten(1) if self.conv else self.last(x)

def plain(num_classes): return Net(num_classes)
def any_keyword(**keywords): return Net(keywords["num_classes"])
def fixed(): return Net(11)
def convolution(): return Net(11, conv=True)
def softmax(): return nn.Sequential(Net(5), nn.Softmax(1))
def features(): return nn.Conv2d(3, 8, 1)
def pair():
    class Pair(Net):
        def forward(self, x): return super().forward(x), x
    return Pair(5)
def small_only(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
def broken(): raise RuntimeError("no such luck")
def number(): return 7
def needs(width): return Net(width)
constant = 3
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of factories in the current folder, another one each time, as Python caches modules."""
    module = f"factories_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{module}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return module


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


@pytest.mark.parametrize("factory", ["plain", "any_keyword", "fixed", "convolution"])
def test_own_models_get_a_classifier_of_their_own(factories: str, factory: str) -> None:
    state = torch.random.get_rng_state()
    backbone = load_backbone(f"{factories}:{factory}", num_classes=5, image_size=40)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (backbone.head, logits(backbone).shape) == ("last", (2, 5))
    assert backbone.preprocessing.image_size == (40, 40)
    again = build_architecture(BackboneSpec.from_json(json.loads(json.dumps(backbone.spec.to_json()))))
    again.load_state_dict(backbone.model.state_dict(), assign=True)
    assert torch.equal(logits(backbone, again), logits(backbone))


def test_own_models_load_files_strictly(factories: str, tmp_path: Path) -> None:
    trained = load_backbone(f"{factories}:plain", num_classes=9, seed=5)
    save_file(trained.model.state_dict(), tmp_path / "own.safetensors", {"architecture": f"{factories}:plain"})
    loaded = load_backbone(f"{factories}:plain", num_classes=5, weights=tmp_path / "own.safetensors")
    assert loaded.fingerprint == trained.fingerprint
    message = refused(f"{factories}:fixed", weights=tmp_path / "own.safetensors")
    assert f"says it holds weights of '{factories}:plain'" in message


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("plane", "has no 'plane'"),
        ("constant", "holds no callable 'constant'"),
        ("broken", "failed: RuntimeError: no such luck"),
        ("number", "returned int, expected a torch.nn.Module"),
        ("needs", "missing 1 required positional argument: 'width'"),
        ("softmax", "No nn.Linear or 1x1 convolution of Sequential makes the logits"),
        ("features", "answers one image with the shape [1, 8, 224, 224], expected [1, classes]"),
        ("pair", "returns tuple, expected one tensor of logits"),
        ("small_only", "does not run on one image of 3x224x224"),
    ],
)
def test_own_models_that_cannot_be_used_are_refused(factories: str, factory: str, message: str) -> None:
    assert message in refused(f"{factories}:{factory}")


def test_modules_that_cannot_be_imported_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needs_more_kp.py").write_text("import not_installed_anywhere_kp")
    (tmp_path / "raises_kp.py").write_text("1 / 0")
    assert "No module 'absent_kp'" in refused("absent_kp:make")
    assert "imports what is not there: No module named 'not_installed_anywhere_kp'" in refused("needs_more_kp:make")
    assert "failed: ZeroDivisionError" in refused("raises_kp:make")
