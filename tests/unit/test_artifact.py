from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import multiprocessing
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as write_tensors
from torch import nn

from kinprune.artifact import Artifact, check_destination, load, save
from kinprune.artifact.description import digest, render
from kinprune.backbones import BackboneSpec, build_architecture, find_classifier, fingerprint
from kinprune.backbones.spec import build_model
from kinprune.errors import ArtifactError
from kinprune.preprocessing import Preprocessing
from kinprune.units import Mask, attributes_of, extract, find_units

CLASSES = ("ant", "bée", "cat")
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}),
    "mobilenetv2_050": (32, {}),
    "regnetx_002": (32, {}),
    "convnext_atto": (32, {}),
    "vit_tiny_patch16_224": (32, {"img_size": [32, 32], "depth": 2}),
    "swin_tiny_patch4_window7_224": (
        56,
        {"img_size": [56, 56], "depths": [2, 2], "num_heads": [3, 6], "embed_dim": 48},
    ),
}
FACTORIES = """
import torch
from torch import nn


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.register_buffer("scale", torch.linspace(1, 2, 8).view(1, 8, 1, 1), persistent=False)
        self.conv2 = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.conv2((self.conv1(x) * self.scale).relu()).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(self.conv(x).mean((2, 3))).relu()))
"""


def cut(model: nn.Module, spec: BackboneSpec, preprocessing: Preprocessing, keep: float = 0.5, **more: Any) -> Artifact:
    """An artifact that keeps a random share of every group."""
    space = find_units(model, preprocessing.image_size, head=spec.head, **more)
    random, kept = np.random.default_rng(3), np.zeros(len(space), dtype=bool)
    for part in space.split(kept):
        part[random.choice(len(part), max(1, round(keep * len(part))), replace=False)] = True
    names = [group.name for group in space.groups]
    return Artifact(
        extract(model, space, Mask(kept, space.fingerprint)),
        spec,
        preprocessing,
        CLASSES,
        kept={name: np.flatnonzero(part).tolist() for name, part in zip(names, space.split(kept), strict=True)},
        group_sizes={group.name: group.size for group in space.groups},
        kinds={group.name: group.kind for group in space.groups},
        backbone_fingerprint=fingerprint(model, spec, preprocessing),
        space_fingerprint=space.fingerprint,
        attributes=attributes_of(space, space.counts(kept).tolist()),
        seed=7,
        metrics={"accuracy": 0.1 + 0.2, "costs": {"parameters": 12}},
        provenance={"task": "insects", "options": ["a", None, True]},
    )


@cache
def artifact_of(name: str, stream: bool = False) -> Artifact:
    size, arguments = FAMILIES[name]
    model = build_model(name, arguments, len(CLASSES), seed=1)
    spec = BackboneSpec(name, arguments, len(CLASSES), find_classifier(model))
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = torch.randn(module.num_features, generator=generator) / 10
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    preprocessing = Preprocessing((size, size), std=(0.2, 0.21, 1 / 3), interpolation="bilinear", crop_pct=0.875)
    return cut(model, spec, preprocessing, stream=stream)


@pytest.fixture
def artifact() -> Artifact:
    return artifact_of("mobilenetv2_050")


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(artifact_of("mobilenetv2_050"), tmp_path_factory.mktemp("saved") / "stored")


@pytest.fixture
def stored(saved_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_once, tmp_path / "stored")


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Artifact]]:
    (tmp_path / "own_models.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)

    def make(name: str) -> Artifact:
        model = build_model(f"own_models:{name}", {}, 3, seed=5)
        return cut(model, BackboneSpec(f"own_models:{name}", {}, 3, "head"), Preprocessing((16, 16)))

    yield make
    sys.modules.pop("own_models", None)


def images(artifact: Artifact, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, *artifact.preprocessing.image_size, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def same_answers(first: Artifact, second: Artifact) -> bool:
    return torch.equal(first.model(images(first)), second.model(images(first)))


def change(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Alter a description as someone does who makes its digest right again."""
    path = directory / "kinprune.json"
    content = json.loads(path.read_text())
    edit(content)
    content["digest"] = digest(content)
    path.write_text(render(content))


def change_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Alter tensors as someone does who makes every hash right again."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    raw = write_tensors(tensors)
    (directory / "model.safetensors").write_bytes(raw)
    change(
        directory,
        lambda content: content.update(tensors={"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}),
    )


def siblings(path: Path) -> list[str]:
    return sorted(other.name for other in path.parent.iterdir() if other != path)


@pytest.mark.parametrize("stream", [False, True], ids=["in-block", "stream"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_model_answers_bit_for_bit_as_the_saved_one(name: str, stream: bool, tmp_path: Path) -> None:
    saved = artifact_of(name, stream)
    loaded = load(save(saved, tmp_path / "model"))
    assert not any(module.training for module in loaded.model.modules())
    assert same_answers(saved, loaded)
    tensors = saved.model.state_dict()
    assert all(torch.equal(tensors[key], value) for key, value in loaded.model.state_dict().items())


@pytest.mark.parametrize("name", ["mobilenetv2_050", "vit_tiny_patch16_224"])
def test_a_loaded_model_can_be_pruned_further(name: str, tmp_path: Path) -> None:
    loaded = load(save(artifact_of(name), tmp_path / "model"))
    smaller = cut(loaded.model, loaded.spec, loaded.preprocessing)
    assert smaller.group_sizes == {group: len(kept) for group, kept in loaded.kept.items()}
    assert smaller.model(images(loaded)).shape == (3, 3)


def test_all_that_is_known_comes_back(artifact: Artifact, stored: Path) -> None:
    loaded = load(stored)
    for field in dataclasses.fields(Artifact):
        if field.name != "model":
            assert getattr(loaded, field.name) == getattr(artifact, field.name), field.name
    assert list(loaded.kept) == list(artifact.kept)  # in forward order
    assert loaded.head == artifact.spec.head


def test_the_directory_holds_three_readable_files(stored: Path) -> None:
    assert sorted(path.name for path in stored.iterdir()) == ["README.md", "kinprune.json", "model.safetensors"]
    text = (stored / "kinprune.json").read_text()
    content = json.loads(text)
    assert content["format"] == 1
    assert list(content) == sorted(content)
    assert set(content["versions"]) == {"kinprune", "python", "timm", "torch"}
    assert len(text.splitlines()) < 1500  # the kept units of a group are one line
    readme = (stored / "README.md").read_text(encoding="utf-8")
    assert 'kinprune.load("stored")' in readme
    assert "ant, bée, cat" in readme
    assert "| costs.parameters | 12 |" in readme
    assert siblings(stored) == []


def test_saving_twice_writes_the_same_bytes(artifact: Artifact, stored: Path, tmp_path: Path) -> None:
    other = save(artifact, tmp_path / "other")
    for name in ("kinprune.json", "model.safetensors"):
        assert (stored / name).read_bytes() == (other / name).read_bytes()


def test_loading_needs_neither_tracing_nor_random_numbers(stored: Path) -> None:
    before = torch.random.get_rng_state()
    started = time.perf_counter()
    load(stored)
    assert time.perf_counter() - started < 2  # a tenth of this where nothing else runs
    assert torch.equal(torch.random.get_rng_state(), before)


def test_saving_leaves_model_and_generator_as_they_were(artifact: Artifact, tmp_path: Path) -> None:
    model = copy.deepcopy(artifact.model).train()
    state, before = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    save(dataclasses.replace(artifact, model=model), tmp_path / "model")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_channels_last_is_stored_contiguous(artifact: Artifact, tmp_path: Path) -> None:
    model = copy.deepcopy(artifact.model).to(memory_format=torch.channels_last)
    loaded = load(save(dataclasses.replace(artifact, model=model), tmp_path / "model"))
    assert all(tensor.is_contiguous() for tensor in loaded.model.state_dict().values())
    assert same_answers(artifact, loaded)


def test_a_loaded_model_can_be_trained(stored: Path) -> None:
    model = load(stored).model.train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_cut_buffer_that_is_not_persistent_is_stored(factory: Callable[[str], Artifact], tmp_path: Path) -> None:
    saved = factory("Scaled")
    assert saved.model.get_buffer("scale").shape == (1, 4, 1, 1)
    loaded = load(save(saved, tmp_path / "model"))
    assert same_answers(saved, loaded)
    assert "scale" not in loaded.model.state_dict()


def test_tied_tensors_are_stored_once_and_stay_tied(factory: Callable[[str], Artifact], tmp_path: Path) -> None:
    saved = factory("Tied")
    path = save(saved, tmp_path / "model")
    assert "second.weight" not in load_file(path / "model.safetensors")
    assert json.loads((path / "kinprune.json").read_text())["aliases"] == {"second.weight": "first.weight"}
    loaded = load(path)
    assert loaded.model.get_parameter("second.weight") is loaded.model.get_parameter("first.weight")
    assert same_answers(saved, loaded)


def test_a_factory_that_is_not_there_is_named(factory: Callable[[str], Artifact], tmp_path: Path) -> None:
    path = save(factory("Tied"), tmp_path / "model")
    (tmp_path / "own_models.py").unlink()
    sys.modules.pop("own_models")
    with pytest.raises(ArtifactError, match="No module 'own_models'"):
        load(path)


def test_loading_neither_traces_nor_unpickles(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not while loading")

    refused: list[tuple[Any, str]] = [
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (torch, "compile"),
        (torch.jit, "trace"),
        (torch.fx.Tracer, "trace"),
        (nn.Module, "__call__"),
    ]
    for place, name in refused:
        monkeypatch.setattr(place, name, refuse)
    load(stored)


# Where artifacts are written.


def test_what_is_no_artifact_is_not_overwritten(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    with pytest.raises(ArtifactError, match="is no artifact"):
        save(artifact, tmp_path / "photos", overwrite=True)
    with pytest.raises(ArtifactError, match="is a file"):
        save(artifact, tmp_path / "photos" / "one.png")
    with pytest.raises(ArtifactError, match="no folder"):
        save(artifact, tmp_path / "photos" / "one.png" / "model")
    assert siblings(tmp_path / "photos") == []


def test_an_artifact_is_overwritten_only_when_asked_and_alone(stored: Path) -> None:
    other = artifact_of("resnet18")
    with pytest.raises(ArtifactError, match="already holds an artifact"):
        save(other, stored)
    assert load(stored).spec.name == "mobilenetv2_050"
    (stored / "notes.txt").touch()
    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        save(other, stored, overwrite=True)
    (stored / "notes.txt").unlink()
    check_destination(stored, overwrite=True)
    save(other, stored, overwrite=True)
    assert same_answers(other, load(stored))
    assert siblings(stored) == []


def test_parents_are_made_and_an_empty_directory_is_used(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert save(artifact, place) == place
        load(place)


def test_a_link_to_an_artifact_stays_a_link(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(stored, target_is_directory=True)
    save(artifact_of("resnet18"), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert load(stored).spec.name == "resnet18"


def test_an_interrupted_save_leaves_what_was_there(stored: Path, tmp_path: Path) -> None:
    other = artifact_of("resnet18")
    model = copy.deepcopy(other.model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model.register_forward_pre_hook(interrupt)  # it runs when the files are complete and not yet in place
    for place in (stored, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            save(dataclasses.replace(other, model=model), place, overwrite=True)
    assert siblings(stored) == []
    assert load(stored).spec.name == "mobilenetv2_050"


def _save_for_ever(artifact: Artifact, place: Path) -> None:
    torch.set_num_threads(1)
    while True:
        save(artifact, place, overwrite=True)


@pytest.mark.skipif(sys.platform != "linux", reason="a process is forked, so that it starts at once")
def test_a_killed_save_leaves_a_whole_artifact(artifact: Artifact, stored: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for delay in (0.05, 0.13, 0.21, 0.34):
            process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(artifact, stored))
            process.start()
            time.sleep(delay)
            process.kill()
            process.join()
            if not stored.exists():  # killed in the moment between the two moves
                with pytest.raises(ArtifactError, match="move it back"):
                    load(stored)
                next(stored.parent.glob(".stored.*.old")).rename(stored)
            assert same_answers(artifact, load(stored))
    finally:
        torch.set_num_threads(threads)


def test_an_interrupted_overwriting_is_told_of(stored: Path) -> None:
    stored.rename(stored.with_name(".stored.0a1b2c3d.old"))
    with pytest.raises(ArtifactError, match=r"\.stored\.0a1b2c3d\.old, move it back"):
        load(stored)


# What is not written.


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"classes": ("ant", "bee")}, "2 classes, but the head makes 3"),
        ({"classes": ("ant", "bee", "bee")}, "two classes have the same name"),
        ({"classes": ("ant", "bee", "")}, "a class has no name"),
        ({"metrics": {"loss": float("nan")}}, "metrics"),
        ({"provenance": {"when": object()}}, "provenance"),
        ({"group_sizes": {}}, "name other groups"),
        ({"attributes": {}}, "expected"),
        ({"spec": BackboneSpec("no_such_net", {}, 3, "head")}, "no_such_net"),
        ({"spec": BackboneSpec("resnet18", {}, 3, "fc")}, "tensors of the architecture are missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_contradictory_artifact_is_not_written(
    artifact: Artifact, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ArtifactError, match=problem):
        save(dataclasses.replace(artifact, **changes), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_number_of_heads_is_noticed(tmp_path: Path) -> None:
    whole = artifact_of("vit_tiny_patch16_224")
    attributes = {
        name: {key: value for key, value in values.items() if key not in ("num_heads", "attn_dim")}
        for name, values in whole.attributes.items()
    }
    with pytest.raises(ArtifactError, match=r"does not run|answers differently"):
        save(dataclasses.replace(whole, attributes=attributes), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["nan", "half"])
def test_unusable_tensors_are_not_written(artifact: Artifact, tmp_path: Path, kind: str) -> None:
    model = copy.deepcopy(artifact.model)
    if kind == "half":
        model.half()
    else:
        with torch.no_grad():
            model.get_parameter("classifier.bias")[1] = float("nan")
    expected = "'classifier.bias' holds NaN" if kind == "nan" else r"is torch\.float16, expected torch\.float32"
    with pytest.raises(ArtifactError, match=expected):
        save(dataclasses.replace(artifact, model=model), tmp_path / "model")


# What is not read.


def test_missing_places_and_files_are_named(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not there, expected an artifact's directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="is a file"):
        load(stored / "kinprune.json")
    (stored / "README.md").unlink()
    load(stored)
    for name in ("model.safetensors", "kinprune.json"):
        (stored / name).unlink()
        with pytest.raises(ArtifactError, match=rf"{name} cannot be read \(No such file"):
            load(stored)


def test_damaged_json_is_refused(stored: Path) -> None:
    path = stored / "kinprune.json"
    text = path.read_text()
    for damaged in ("", "[]", "null", text[:-30], "[" * 100_000, "\x00", '{"format": 1e999}', "{}", '{"format": true}'):
        path.write_text(damaged)
        with pytest.raises(ArtifactError, match=r"damaged|describes no artifact"):
            load(stored)
    path.write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
    with pytest.raises(ArtifactError, match=r"damaged|altered"):
        load(stored)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"ant"', '"and"'),
        ('"seed": 7', '"seed": 8'),
        ('"seed": 7', '"seed":  7'),
        ('"seed": 7', '"seed": 8,\n  "seed": 7'),
        ("{", "{\n"),
    ],
)
def test_altered_json_is_refused(stored: Path, old: str, new: str) -> None:
    path = stored / "kinprune.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ArtifactError, match=r"altered after it was written: get the artifact again"):
        load(stored)


def test_truncated_and_altered_tensors_are_refused(stored: Path) -> None:
    path = stored / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-4])
    with pytest.raises(ArtifactError, match=rf"has {len(raw) - 4} bytes, expected {len(raw)}"):
        load(stored)
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="damaged or was altered"):
        load(stored)


def test_a_newer_format_asks_for_an_upgrade(stored: Path) -> None:
    change(stored, lambda content: content.update(format=2, novelty=[]))
    with pytest.raises(ArtifactError, match="written by a newer Kinprune, upgrade"):
        load(stored)


def test_another_version_of_timm_is_told_of(stored: Path) -> None:
    change(stored, lambda content: content["versions"].update(timm="0.0.1"))
    load(stored)  # it may well fit
    change(stored, lambda content: content["spec"].update(name="resnet18", head="fc"))
    with pytest.raises(ArtifactError, match=r"made with timm 0\.0\.1"):
        load(stored)


def _first_group(content: dict[str, Any], **values: Any) -> None:
    content["groups"][0].update(values)


CRAFTED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key": (lambda c: c.update(hook="os.system"), "unknown keys"),
    "missing key": (lambda c: c.pop("seed"), "lacks some"),
    "no classes": (lambda c: c.update(classes=[]), "0 classes, but the head makes 3"),
    "more classes": (lambda c: c["classes"].append("dog"), "4 classes, but the head makes 3"),
    "class of another type": (lambda c: c.update(classes=["a", "b", {}]), "a class has no name"),
    "classes are text": (lambda c: c.update(classes="abc"), "classes is of type str"),
    "units out of range": (lambda c: _first_group(c, kept=[0, 10**6]), "expected some of 0 to"),
    "negative unit": (lambda c: _first_group(c, kept=[-1, 2]), "expected some of 0 to"),
    "unsorted units": (lambda c: _first_group(c, kept=[2, 1]), "not ascending"),
    "duplicated units": (lambda c: _first_group(c, kept=[1, 1]), "not ascending"),
    "no units": (lambda c: _first_group(c, kept=[]), "keeps no unit"),
    "units are no numbers": (lambda c: _first_group(c, kept=[0, True]), "not all whole numbers"),
    "unknown kind": (lambda c: _first_group(c, kind="soul"), "unknown kind"),
    "size is text": (lambda c: _first_group(c, size="8"), "is of type str"),
    "key of a group": (lambda c: _first_group(c, colour=1), "not exactly name, kind, size and kept"),
    "same group twice": (lambda c: c["groups"].append(c["groups"][0]), "two groups have the same name"),
    "no groups": (lambda c: c.update(groups=[]), "no group"),
    "fingerprints": (lambda c: c.update(fingerprints={}), "fingerprints"),
    "seed": (lambda c: c.update(seed=1.5), "seed is of type float"),
    "preprocessing lacks": (lambda c: c["preprocessing"].pop("mean"), "preprocessing has the keys"),
    "preprocessing is null": (lambda c: c["preprocessing"].update(mean=None), "missing"),
    "preprocessing is wrong": (lambda c: c["preprocessing"].update(std=[0, 1, 1]), "std"),
    "unknown backbone": (lambda c: c["spec"].update(name="../../evil"), "neither a timm model name"),
    "no such factory": (lambda c: c["spec"].update(name="no_such_module_x:make"), "No module"),
    "weights from elsewhere": (lambda c: c["spec"]["arguments"].update(checkpoint_path="/etc/passwd"), "must not set"),
    "no such head": (lambda c: c["spec"].update(head="conv_stem"), "cannot be used"),
    "head elsewhere": (lambda c: c["spec"].update(head="no.such"), "no layer"),
    "logits": (lambda c: (c["spec"].update(num_classes=2), c.update(classes=["a", "b"])), "classifier"),
    "another architecture": (lambda c: c["spec"].update(name="mobilenetv2_035"), "cannot be used"),
    "unknown module": (lambda c: c["attributes"].update({"..": {"x": 1}}), "no module"),
    "unknown attribute": (lambda c: c["attributes"].update({"classifier": {"x": 1}}), "no part of None"),
    "method": (lambda c: c["attributes"].update({"classifier": {"forward": 1}}), "no part of None"),
    "bool": (lambda c: c["attributes"].update({"classifier": {"training": 1}}), "no part of"),
    "text": (lambda c: c["attributes"].update({"classifier": {"out_features": "3"}}), "no part of"),
    "greater": (lambda c: c["attributes"].update({"classifier": {"out_features": 4}}), "no part of"),
    "smaller head": (lambda c: c["attributes"].update({"classifier": {"out_features": 2}}), "classifier"),
    "zero": (lambda c: c["attributes"].update({"classifier": {"out_features": 0}}), "no part of"),
    "tuple": (lambda c: c["attributes"].update({"conv_stem": {"kernel_size": [3]}}), "no part of"),
    "no attributes": (lambda c: c.update(attributes={}), "expected"),
    "alias of nothing": (lambda c: c["aliases"].update(x="y"), "no place in the architecture"),
    "alias of a stored one": (lambda c: c["aliases"].update({"bn1.bias": "bn1.weight"}), "is said to be"),
    "alias is no name": (lambda c: c["aliases"].update({"bn1.bias": []}), "no name of a tensor"),
    "tensors elsewhere": (lambda c: c["tensors"].update(path="../../../etc/passwd"), "no size and hash"),
    "hash of something": (lambda c: c["tensors"].update(sha256=None), "altered"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_descriptions_are_refused(stored: Path, name: str) -> None:
    edit, problem = CRAFTED[name]
    change(stored, edit)
    with pytest.raises(ArtifactError, match=problem):
        load(stored)


def test_endless_nesting_is_refused(stored: Path) -> None:
    text = (stored / "kinprune.json").read_text()
    nested = "[" * 900 + "]" * 900
    (stored / "kinprune.json").write_text(text.replace('"seed": 7', f'"seed": {nested}'))
    with pytest.raises(ArtifactError, match=r"nested|damaged"):
        load(stored)


def _with_first_row_missing(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks.1.0.conv_pw.weight"] = tensors["blocks.1.0.conv_pw.weight"][1:].contiguous()


CRAFTED_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("conv_stem.weight"), r"1 tensors of the architecture are missing \(conv_stem\.weight"),
    "unexpected": (lambda t: t.update(extra=torch.zeros(1)), r"no place in the architecture \(extra"),
    "type": (lambda t: t.update({"bn1.bias": t["bn1.bias"].double()}), r"'bn1\.bias' is torch\.float64"),
    "NaN": (lambda t: t["bn1.bias"].fill_(float("nan")), r"'bn1\.bias' holds NaN"),
    "infinity": (lambda t: t["bn1.running_var"].fill_(float("inf")), r"'bn1\.running_var' holds NaN or infinity"),
    "greater": (lambda t: t.update({"classifier.bias": torch.zeros(9)}), r"'classifier\.bias' is \[9\]"),
    "dimensions": (lambda t: t.update({"classifier.bias": torch.zeros(3, 1)}), r"'classifier\.bias' is \[3, 1\]"),
    "empty": (lambda t: t.update({"classifier.bias": torch.zeros(0)}), r"'classifier\.bias' is \[0\]"),
    "wrong cut": (_with_first_row_missing, r"'blocks\.1\.0\.conv_pw'"),
    "bias": (lambda t: t.update({"classifier.bias": torch.zeros(2)}), "a tensor of 'classifier'"),
}


@pytest.mark.parametrize("name", CRAFTED_TENSORS)
def test_crafted_tensors_are_refused(stored: Path, name: str) -> None:
    edit, problem = CRAFTED_TENSORS[name]
    change_tensors(stored, edit)
    with pytest.raises(ArtifactError, match=problem):
        load(stored)


def test_tensors_that_are_no_safetensors_are_refused(stored: Path) -> None:
    raw = b"\x80\x04 a pickle"
    (stored / "model.safetensors").write_bytes(raw)
    found = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    change(stored, lambda content: content.update(tensors=found))
    with pytest.raises(ArtifactError, match="no safetensors file"):
        load(stored)


def test_pretrained_models_come_back(shared: Path, tmp_path: Path) -> None:
    from kinprune.backbones import load_backbone

    backbone = load_backbone(
        "vit_tiny_patch16_224",
        num_classes=3,
        weights=shared / "weights" / "vit_tiny_patch16_224.safetensors",
        image_size=112,
    )
    saved = cut(backbone.model, backbone.spec, backbone.preprocessing)
    loaded = load(save(saved, tmp_path / "model"))
    assert same_answers(saved, loaded)
    assert loaded.backbone_fingerprint == backbone.fingerprint
    assert all(parameter.is_meta for parameter in build_architecture(loaded.spec).parameters())
