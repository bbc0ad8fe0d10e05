"""The bank learns from what was adapted: a record goes by file into the bank, and the next adaptation asks it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kinprune as kp
from kinprune.adapt_plan import AdaptPlan
from kinprune.adaptation import Adapted
from kinprune.adapted import adapted_artifact, adapted_record
from kinprune.bank import Record, open_bank, read_record, verify, write_record
from kinprune.building import Source, build, sample_sources
from kinprune.kin import Search

Cli = Callable[..., Any]

PLAN = kp.Plan(kp.Budget(keep=0.3), rounds=1, score_images=16, recipe=kp.Recipe(steps=1, batch_size=8))
QUICK = AdaptPlan(search=Search(count=3), recipe=kp.Recipe(steps=2, batch_size=8))
SUMMARY = {
    "bank",
    "added",
    "present",
    "records",
    "accuracy_dense",
    "accuracy_closed_form",
    "accuracy",
    "seconds_per_task",
    "seconds",
}


@dataclass(frozen=True, eq=False)
class World:
    """A bank of four tasks, a task it has not seen, and a model adapted to it, saved with its record in ``out``."""

    bank: Path
    folder: Path
    task: kp.DecodedTask
    space: kp.UnitSpace
    adapted: Adapted
    record: Record
    out: Path


@pytest.fixture(scope="module")
def world(make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("add")
    known = make_folder(root / "known", ("ant", "bat", "cow", "dog"), 8, 36)
    folder = make_folder(root / "new", ("apple", "pear", "plum"), 12, 36)
    backbone = kp.load_backbone("test_resnet", num_classes=3, random=True, image_size=32)
    space = kp.find_units(backbone.model, (32, 32), head=backbone.head)
    bank = kp.create_bank(root / "bank.db", backbone, space)
    build(bank, sample_sources([Source(str(known))], 4, 2), PLAN)
    task = kp.decode(kp.load_task(folder), backbone.preprocessing)
    adapted = kp.adapt(task, bank, kp.Budget(keep=0.4), QUICK)
    record = adapted_record(adapted, adapted.sizes[0], task)
    kp.save(adapted_artifact(adapted, adapted.sizes[0], task), root / "out")
    write_record(record, bank.header, root / "out" / "record.safetensors")
    bank.close()
    return World(root / "bank.db", folder, task, space, adapted, record, root / "out")


@pytest.fixture
def bank(world: World, tmp_path: Path) -> Path:
    """A copy of the bank, to change."""
    shutil.copy(world.bank, tmp_path / "bank.db")
    shutil.copytree(f"{world.bank}.weights", tmp_path / "bank.db.weights")
    return tmp_path / "bank.db"


def slow_ranking(space: kp.UnitSpace, kept: Any, ordered_by: list[Any]) -> list[int]:
    """Each unit's place in its group, a unit at a time: the kept first, then by each of the scores, then by index."""
    places, start = [0] * len(space), 0
    for group in space.groups:
        units = range(start, start + group.size)
        order = sorted(units, key=lambda unit: (not kept[unit], *(-values[unit] for values in ordered_by), unit))
        for place, unit in enumerate(order):
            places[unit] = place
        start += group.size
    return places


@pytest.mark.parametrize("method", ["mvp", "smsp"])
@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_the_record_says_what_the_model_is(world: World, method: Any, blend: float) -> None:
    plan = replace(QUICK, method=method, blend=blend, criterion="l1", recipe=kp.Recipe(steps=0))
    budgets = [kp.Budget(keep=0.4), kp.Budget(keep=0.2)]
    adapted = kp.adapt(world.task, world.bank, budgets, plan)
    lessons = open_bank(world.bank).lessons([neighbour.entry.id for neighbour in adapted.neighbours])
    found = [adapted_record(adapted, sized, world.task) for sized in adapted.sizes]
    assert found[0].key != found[1].key and len(found[0].key) == 64
    for record, sized in zip(found, adapted.sizes, strict=True):
        kept, ballot = sized.selection.mask.kept, sized.ballot
        assert record.mask == sized.selection.mask and record.classes == world.task.classes
        assert record.ranking.tolist() == slow_ranking(world.space, kept, [ballot.scores, *ballot.ties])
        # So the ranking at the record's own counts is its mask: neighbours that vote for it vote for what it kept.
        assert np.array_equal(record.ranking < world.space.counts(kept)[world.space.group_of], kept)
        assert record.scores.dtype == np.float16
        for part in world.space.split(record.scores.astype(float)):  # the last norm of a new block is 0: no importance
            assert part.mean() == pytest.approx(1, abs=0.02) or (blend == 0 and not part.any())
        if blend == 0:  # by either method: what a score mask of these neighbours averages
            soft = np.average(lessons.scores.astype(float), axis=0, weights=adapted.weights)
            assert record.scores.astype(float) == pytest.approx(kp.normalise(world.space, soft), rel=2e-3, abs=1e-3)
        shares = record.accuracy
        assert (shares.dense, shares.start) == (adapted.dense.accuracy, sized.start.accuracy)
        assert shares.final == sized.final.accuracy
        assert all(torch.equal(record.tensors[name], value) for name, value in sized.model.state_dict().items())
        assert record.details["adapted"] is True and record.details["plan"]["budget"]["keep"] == sized.budget.keep
        assert record.details["neighbours"] == [neighbour.entry.key for neighbour in adapted.neighbours]
        assert json.loads(json.dumps(record.details)) == record.details


def test_the_kept_come_first_whatever_the_ballot_says(world: World) -> None:
    (sized,) = world.adapted.sizes
    last = kp.Mask(world.record.ranking == world.space.sizes[world.space.group_of] - 1, world.space.fingerprint)
    other = replace(sized, selection=replace(sized.selection, mask=last))
    ranking = adapted_record(world.adapted, other, world.task).ranking
    assert ranking.tolist() == slow_ranking(world.space, last.kept, [sized.ballot.scores, *sized.ballot.ties])
    assert np.array_equal(ranking == 0, last.kept)


def add(kinprune: Cli, data: Path, bank: Path, *options: str) -> Any:
    return kinprune("bank", "add", data, "--bank", bank, *options)


def test_the_bank_learns_from_an_adapted_model(kinprune: Cli, world: World, bank: Path, tmp_path: Path) -> None:
    result = add(kinprune, world.out, bank, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert set(said) == SUMMARY
    assert (said["bank"], said["added"], said["present"], said["records"]) == (str(bank), 1, 0, 5)
    assert said["accuracy"] == world.adapted.sizes[0].final.accuracy
    again = json.loads(add(kinprune, world.out / "record.safetensors", bank, "--json").stdout)
    assert (again["added"], again["present"], again["records"], again["accuracy"]) == (0, 1, 5, None)
    shown = add(kinprune, world.out, bank)
    assert shown.exit_code == 0 and "0 added" in shown.stdout and "1 already there; 5 records in all" in shown.stdout
    opened = open_bank(bank)
    entry = opened.entries()[-1]
    assert (entry.key, entry.name) == (world.record.key, "new") and entry.details == world.record.details
    # What the model learnt comes back: cut from the bank's backbone by the mask, it answers as it did.
    kept = opened.record(entry)
    small = kp.extract(world.adapted.backbone.model, world.space, kept.mask)
    small.load_state_dict(kept.tensors)
    answers, expected = (
        kp.predict(model, world.task.test.images, world.task.preprocessing)
        for model in (small, world.adapted.sizes[0].model)
    )
    assert torch.allclose(answers, expected, atol=0.01)  # half precision
    verified = verify(opened)
    assert verified.whole and verified.unreferenced == ()
    assert kinprune("bank", "show", bank, entry.id).exit_code == 0
    nearest = json.loads(kinprune("kin", world.folder, "--bank", bank, "--json").stdout)["neighbours"]
    assert nearest[0]["key"] == world.record.key and nearest[0]["shared"] == list(world.task.classes)
    adapted = kp.adapt(world.task, opened, kp.Budget(keep=0.4), QUICK)
    assert adapted.neighbours[0].entry.key == world.record.key and adapted.weights[0] == max(adapted.weights)
    alone = replace(QUICK, method="mvp", search=Search(count=1), recipe=kp.Recipe(steps=0))
    (sized,) = kp.adapt(world.task, opened, kp.Budget(keep=0.4), alone).sizes
    assert sized.selection.mask == world.record.mask


def test_what_adapt_writes_is_what_add_takes(kinprune: Cli, world: World, bank: Path, tmp_path: Path) -> None:
    out = tmp_path / "family"
    words = ("--steps", 1, "--batch-size", 8, "--neighbours", 2, "--no-onnx", "--out", out, "--json")
    made = kinprune("adapt", world.folder, "--bank", bank, "--sizes", "0.5,0.3", *words)
    assert made.exit_code == 0, made.stderr
    refused = add(kinprune, out, bank)
    assert refused.exit_code == 2
    assert "holds 2 adapted models: add one of them, such as" in " ".join(refused.stderr.split())
    for number, keep in enumerate(("0.5", "0.3"), start=5):
        said = add(kinprune, out / f"keep-{keep}", bank, "--json")
        assert said.exit_code == 0, said.stderr
        assert json.loads(said.stdout)["records"] == number
    assert verify(open_bank(bank)).whole


@pytest.mark.parametrize(
    "words",
    [
        ["--classes", "apple,pear"],
        ["--model", "test_resnet"],
        ["--random"],
        ["--keep", "0.1"],
        ["--steps", "3"],
        ["--seed", "0"],  # the default, but given
        ["--test-fraction", "0.2"],
        ["--device", "cpu"],
        ["--store", "weights"],
        ["--method", "l1", "--stream"],
    ],
    ids=lambda words: words[0],
)
def test_options_that_say_how_to_prune_are_refused(kinprune: Cli, world: World, bank: Path, words: list[str]) -> None:
    result = add(kinprune, world.out, bank, *words)
    named = ", ".join(word for word in words if word.startswith("--"))
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2 and result.stdout == ""
    assert f"is the record of an adapted model, to which {named} cannot be applied: leave out {named}" in said
    assert len(open_bank(bank)) == 4


def test_what_cannot_be_added_is_refused(kinprune: Cli, world: World, bank: Path, tmp_path: Path) -> None:
    def refused(data: Path, address: Path, *said: str) -> None:
        result = add(kinprune, data, address)
        told = " ".join(result.stderr.split())
        assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in told
        assert all(part in told for part in said), told

    missing = tmp_path / "no.db"
    refused(world.out, missing, "there is no bank at", "kinprune bank build")
    assert not missing.exists()
    bare = tmp_path / "bare"
    shutil.copytree(world.out, bare)
    record = (bare / "record.safetensors").read_bytes()
    (bare / "record.safetensors").unlink()
    refused(bare, bank, "an artifact without record.safetensors", "kinprune adapt", "labelled images")
    refused(bare / "model.safetensors", bank, "holds no record of a bank")
    refused(bare / "gone.safetensors", bank, "gone.safetensors does not exist")
    (bare / "record.safetensors").write_bytes(record[:-9])
    refused(bare, bank, "record.safetensors is cut off")
    (bare / "record.safetensors").write_bytes(record[:-9] + bytes(9))
    refused(bare, bank, "altered or damaged")
    backbone = kp.load_backbone("test_resnet", num_classes=3, random=True, image_size=32, seed=1)
    kp.create_bank(tmp_path / "other.db", backbone, world.space)
    refused(world.out, tmp_path / "other.db", "another backbone than the bank", "test_resnet at 32 x 32 pixels")
    assert len(open_bank(bank)) == 4 and verify(open_bank(bank)).unreferenced == ()


def test_a_record_is_read_back_as_it_was_made(world: World) -> None:
    read = read_record(world.out / "record.safetensors", open_bank(world.bank).header)
    assert (read.key, read.mask, read.accuracy) == (world.record.key, world.record.mask, world.record.accuracy)
    for name, tensor in world.record.tensors.items():
        assert torch.equal(read.tensors[name], tensor.half() if tensor.is_floating_point() else tensor), name


def test_help_says_it(kinprune: Cli) -> None:
    shown = " ".join(kinprune("bank", "add", "--help").stdout.split())
    assert "the directory of an adapted model" in shown and "record.safetensors" in shown and "CONTEXT" not in shown
