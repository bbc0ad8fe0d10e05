"""From a pruned model to its artifact, and to what a script wants to know of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kinprune.artifact import load, save
from kinprune.backbones import Backbone, load_backbone
from kinprune.delivery import artifact_of, summarise, versions
from kinprune.evaluation import evaluate
from kinprune.pruning import Plan, Pruned, prune
from kinprune.selection import Budget
from kinprune.tasks import DecodedTask, decode, task_from_arrays
from kinprune.training import Recipe

CLASSES = ("apple", "pear")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("test_byobnet", num_classes=len(CLASSES), random=True, image_size=32)


@pytest.fixture(scope="module")
def task(backbone: Backbone, make_pixels: Callable[..., NDArray[np.uint8]]) -> DecodedTask:
    images = np.stack([make_pixels(name, number, 32) for name in CLASSES for number in range(8)])
    arrays = task_from_arrays(images, np.repeat(np.arange(2), 8), CLASSES, test_fraction=0.5, name="fruit")
    return decode(arrays, backbone.preprocessing)


@pytest.fixture(scope="module")
def pruned(backbone: Backbone, task: DecodedTask) -> Pruned:
    recipe = Recipe(steps=2, batch_size=4, seed=5)
    plan = Plan(Budget(keep=0.5, parameters=180_000), stream=True, multiple=4, recipe=recipe)
    return prune(backbone, task, plan)


def test_an_artifact_says_what_it_is_and_where_it_comes_from(
    pruned: Pruned, backbone: Backbone, task: DecodedTask
) -> None:
    artifact = artifact_of(pruned, backbone, task)
    assert artifact.model is pruned.model and artifact.spec == backbone.spec and artifact.classes == CLASSES
    assert artifact.backbone_fingerprint == backbone.fingerprint
    assert artifact.space_fingerprint == pruned.space.fingerprint
    assert artifact.seed == 5 and artifact.preprocessing == task.preprocessing
    for group, kept in zip(pruned.space.groups, pruned.space.split(pruned.selection.mask.kept), strict=True):
        assert artifact.kept[group.name] == np.flatnonzero(kept).tolist()
        assert (artifact.group_sizes[group.name], artifact.kinds[group.name]) == (group.size, group.kind)
    assert artifact.metrics["accuracy"] == pruned.final.accuracy
    assert artifact.metrics["costs"]["parameters"] == sum(p.numel() for p in pruned.model.parameters())
    assert artifact.provenance["task"] == "fruit" and artifact.provenance["task_digest"] == task.digest
    plan = artifact.provenance["plan"]
    assert (plan["criterion"], plan["recipe"]["steps"], plan["budget"]["parameters"]) == ("taylor", 2, 180_000)


def test_it_answers_the_same_from_the_disk(
    pruned: Pruned, backbone: Backbone, task: DecodedTask, tmp_path: Path
) -> None:
    artifact = artifact_of(pruned, backbone, task)
    loaded = load(save(artifact, tmp_path / "fruit"))
    tensors = pruned.model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.metrics == artifact.metrics and loaded.provenance == artifact.provenance
    found = evaluate(loaded.model, task.test, loaded.preprocessing)
    assert found.accuracy == pruned.final.accuracy == loaded.metrics["accuracy"]


def test_a_summary_is_json_and_adds_up(pruned: Pruned) -> None:
    summary = summarise(pruned)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["budget"] == {"keep": 0.5, "parameters": 180_000}
    assert sum(summary["kept"].values()) == summary["costs"]["units"]
    assert summary["accuracy_closed_form"] == pruned.start.accuracy
    assert summary["accuracy_dense"] == pruned.dense.accuracy
    assert len(summary["losses"]) == 2 and summary["seed"] == 5
    assert all(value >= 0 for value in summary["seconds"].values())


def test_versions_are_those_that_run() -> None:
    assert versions()["torch"] == torch.__version__
    assert set(versions()) == {"kinprune", "torch", "timm", "python"}
