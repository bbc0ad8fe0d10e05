"""The study's baselines run on timm's smallest models, and are what they say they are."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import kinprune as kp
from kinprune.building import Source, build, sample_sources
from kinprune.evaluation import logits
from kinprune.selection import Budget, select

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE_CLASSES = ("ant", "bat", "cow", "dog", "eel")
TARGET_CLASSES = ("apple", "pear", "plum")
PLAN = kp.Plan(kp.Budget(keep=0.5), rounds=1, score_images=16, recipe=kp.Recipe(steps=1, batch_size=8))
KEEP = 0.5
COLUMNS = {"coarse_label": ["fish", "beast"], "fine_label": ["cod", "carp", "crab"]}
SIZES = {"test_resnet": 32, "test_vit": 48}


@dataclass(frozen=True, eq=False)
class World:
    """The study's modules, and one of its targets with its bank; ``state`` is the dense model's at first."""

    baselines: ModuleType
    pretrained: ModuleType
    target: Any
    state: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=list(SIZES))
def world(
    request: pytest.FixtureRequest, make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    root = tmp_path_factory.mktemp(f"study-{request.param}")
    known = make_folder(root / "known", SOURCE_CLASSES, 8, 36)
    make_folder(root / "new", TARGET_CLASSES, 12, 36)
    size = SIZES[request.param]
    backbone = kp.load_backbone(request.param, num_classes=3, random=True, image_size=size)
    space = kp.find_units(backbone.model, (size, size), head=backbone.head)
    bank = kp.create_bank(root / "bank.db", backbone, space)
    build(bank, sample_sources([Source(str(known))], 3, 2), PLAN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY))
        protocol, targets, baselines, pretrained = (
            importlib.import_module(f"benchmarks.study.{name}")
            for name in ("protocol", "targets", "baselines", "pretrained")
        )
        asked = protocol.Targets(("new",), None, 3, None, True, 0, 1, 1, 0)
        target = targets.prepare(asked, bank, root, targets.Drawn("new", TARGET_CLASSES), None)
        yield World(baselines, pretrained, target, copied(target.dense.state_dict()))


def copied(state: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def asked_for(world: World) -> int:
    space = world.target.space
    return select(space, np.zeros(len(space)), Budget(keep=KEEP)).costs.parameters


def check_start(world: World, start: Any) -> None:
    """It answers, has the size asked for, took time, and left the target as it was."""
    answers = logits(start.model, world.target.task.test.images, world.target.task.preprocessing)
    assert answers.shape[1] == len(TARGET_CLASSES) and bool(answers.isfinite().all())
    assert parameters(start.model) == asked_for(world) < parameters(world.target.dense)
    assert start.seconds > 0
    json.dumps(start.details)
    assert world.state.keys() == world.target.dense.state_dict().keys()
    assert all(torch.equal(tensor, world.state[name]) for name, tensor in world.target.dense.state_dict().items())


def test_weak_masks_are_averaged_and_seeded(world: World) -> None:
    votes, means = world.baselines.weak_votes(world.target, KEEP)
    again, _ = world.baselines.weak_votes(world.target, KEEP)
    assert np.array_equal(votes, again) and means.shape == votes.shape
    tenths = votes * world.baselines.WEAK_MASKS
    assert np.array_equal(tenths, np.round(tenths)) and len(np.unique(votes)) > 2
    # Each weak mask keeps the same number in every group, and so does their mean.
    space = world.target.space
    counts = space.counts(select(space, votes, Budget(keep=KEEP)).mask.kept)
    assert [part.sum() for part in space.split(votes)] == pytest.approx(counts.tolist())
    start = world.baselines.weak_masks(world.target, KEEP)
    check_start(world, start)
    assert KEEP < start.details["agreement"] < 1


def test_label_free_reads_no_labels(world: World) -> None:
    found = world.baselines.label_free_scores(world.target)
    order = torch.randperm(len(world.target.fit), generator=torch.Generator().manual_seed(1))
    mixed = kp.tasks.Split(world.target.fit.images, world.target.fit.labels[order])
    other = replace(world.target, fit=mixed)
    head = world.target.backbone.head
    changed = copied(world.target.dense.state_dict())
    try:
        with torch.no_grad():
            world.target.dense.get_parameter(f"{head}.weight").mul_(-3)
        assert np.array_equal(world.baselines.label_free_scores(other), found)
    finally:
        world.target.dense.load_state_dict(changed)
    # It tells units apart wherever labels do; an untrained ResNet's zeroed batch norms hide the others from any loss.
    labelled = world.baselines._taylor(world.target.dense, world.target, images=16, batch=16, seed=0)
    split = world.target.space.split
    assert np.isfinite(found).all() and found.any()
    assert [np.ptp(part) > 0 for part in split(found)] == [np.ptp(part) > 0 for part in split(labelled)]
    # Images do count: others give other scores.
    dark = kp.tasks.Split(world.target.fit.images // 3, world.target.fit.labels)
    assert not np.allclose(world.baselines.label_free_scores(replace(world.target, fit=dark)), found)
    check_start(world, world.baselines.label_free(world.target, KEEP))


def test_torch_pruning_comes_to_the_size_asked_for(world: World) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install 'kinprune[dev]'")
    start = world.baselines.torch_pruning(world.target, KEEP)
    check_start(world, start)
    assert start.details["parameters"] == start.details["parameters_asked"] == parameters(start.model)
    # At this share it would by itself leave whole layers that rounding empties.
    small = world.baselines.torch_pruning(world.target, 0.02)
    assert parameters(small.model) == small.details["parameters_asked"] < parameters(start.model)
    # It can be trained: nothing is frozen, and attention is what it was.
    assert all(parameter.requires_grad and parameter.grad is None for parameter in start.model.parameters())
    flags = [
        [getattr(module, "fused_attn", None) for module in model.modules()]
        for model in (start.model, world.target.dense)
    ]
    assert flags[0] == flags[1]


def test_torch_pruning_says_where_it_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tp = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install 'kinprune[dev]'")
    name = world.target.backbone.spec.name
    monkeypatch.setattr(tp.pruner.BasePruner, "step", lambda self: None)
    with pytest.raises(RuntimeError, match=f"torch-pruning removed nothing of {name}"):
        world.baselines.torch_pruning(world.target, KEEP)

    def fail(self: Any) -> None:
        raise IndexError("out of its depth")

    monkeypatch.setattr(tp.pruner.BasePruner, "step", fail)
    with pytest.raises(RuntimeError, match=f"torch-pruning fails on {name}: IndexError: out of its depth"):
        world.baselines.torch_pruning(world.target, KEEP)


def test_reptile_moves_the_weights_and_is_learned_once(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    start = world.baselines.reptile(world.target, KEEP, episodes=2)
    assert capsys.readouterr().err.count("reptile: episode") == 2
    check_start(world, start)
    path = world.pretrained.cache_folder(world.target.bank) / "reptile.safetensors"
    stamp = path.stat().st_mtime_ns
    again = world.baselines.reptile(world.target, KEEP, episodes=2)
    assert path.stat().st_mtime_ns == stamp and not capsys.readouterr().err
    assert same(start.model, again.model)
    head = world.target.backbone.head
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        moved = {name for name in names if not torch.equal(file.get_tensor(name), world.state[name])}
        made = json.loads(file.metadata()["made"])
    assert names == {name for name in world.state if not name.startswith(f"{head}.")}
    assert {name for name in names if name.endswith("weight") and world.state[name].dim() > 1} <= moved
    assert made == json.loads(path.with_suffix(".json").read_text()) and made["asked"]["episodes"] == 2
    # What is asked for otherwise is learned anew.
    world.baselines.reptile(world.target, KEEP, episodes=1)
    assert path.stat().st_mtime_ns != stamp


def test_reptile_leaves_folded_batch_norms_alone(world: World) -> None:
    """Their mean of 0 and variance of 1 are no statistics: counted anew, they would undo the weights."""
    model = kp.load_backbone("test_resnet", num_classes=3, random=True, image_size=32).model
    norm, other = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)][:2]
    torch.nn.init.constant_(norm.bias, 0.5)
    before = copied(model.state_dict())
    loss = world.pretrained._inner(model, world.target.fit, world.target.task.preprocessing, seed=0)
    assert np.isfinite(loss) and not model.training
    assert bool((norm.running_mean == 0).all()) and bool((norm.running_var == 1).all())
    assert bool((other.running_mean != 0).any())
    assert not torch.equal(model.get_parameter("conv1.0.weight"), before["conv1.0.weight"])


def test_the_label_column_of_a_banks_parquet_is_found(world: World, tmp_path: Path, make_pixels: Any) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for number in range(12):
        content = io.BytesIO()
        Image.fromarray(make_pixels("ant", number, 8)).save(content, "PNG")
        rows.append({"image": {"bytes": content.getvalue()}, "coarse_label": number % 2, "fine_label": number % 3})
    schema = arrow.Table.from_pylist(rows).schema
    kinds = {name: {"_type": "ClassLabel", "names": names} for name, names in COLUMNS.items()}
    told = json.dumps({"info": {"features": {"image": {"_type": "Image"}, **kinds}}})
    table = arrow.Table.from_pylist(rows, schema=schema.with_metadata({"huggingface": told}))
    parquet.write_table(table, tmp_path / "train.parquet")
    entries = [entry(tmp_path, ("cod", "carp")), entry(tmp_path, ("carp", "crab"))]
    found = world.pretrained.sources_of(SimpleNamespace(entries=lambda: entries), shots=2)
    assert found == world.pretrained.SourceImages(str(tmp_path), "fine_label", ("carp", "cod", "crab"), 2)
    elsewhere = [*entries, entry(tmp_path / "other", ("carp", "crab"))]
    with pytest.raises(ValueError, match="are of the data sets"):
        world.pretrained.sources_of(SimpleNamespace(entries=lambda: elsewhere))
    gone = [entry(tmp_path / "other", ("carp", "crab"))]
    with pytest.raises(ValueError, match=r"cannot be loaded: .*does not exist"):
        world.pretrained.sources_of(SimpleNamespace(entries=lambda: gone))


def entry(data: Path, classes: tuple[str, ...]) -> SimpleNamespace:
    return SimpleNamespace(details={"data": str(data)}, classes=classes)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())
