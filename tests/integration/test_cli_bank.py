"""The bank on the command line: built, extended, looked into, merged, checked and mended; bad input refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kinprune as kp
from kinprune.bank import Accuracy, open_bank
from kinprune.bank.claims import claim
from kinprune.building import BROAD_TIMES, SOURCE_PLAN, Done
from kinprune.cli import bank_options, bank_progress
from kinprune.cli.bank_progress import duration, time_left

Cli = Callable[..., Any]

MODEL = "--model test_resnet --random --image-size 32"
QUICK = "--rounds 1 --steps 1 --batch-size 8"
DRAWN = f"{QUICK} --classes 2 --broad-steps 0"

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
LINE = {
    "id",
    "key",
    "name",
    "classes",
    "images",
    "accuracy_dense",
    "accuracy_closed_form",
    "accuracy",
    "weight_bytes",
    "created",
    "kept_share",
}


def run(kinprune: Cli, command: str, **folders: Path) -> Any:
    return kinprune(*shlex.split(command.format(**folders)))


def one_object(result: Any) -> dict[str, Any]:
    """The one JSON object on standard output of a command that went well."""
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


@pytest.fixture(scope="module")
def built(
    kinprune: Cli, fruit: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[str]]:
    """A bank of two drawn tasks in a folder of its own; what build said in JSON and on standard error."""
    bank = tmp_path_factory.mktemp("built") / "bank.db"
    result = run(
        kinprune, f"bank build {{fruit}} --bank {{bank}} {MODEL} {DRAWN} --tasks 2 --json", fruit=fruit, bank=bank
    )
    return bank, one_object(result), result.stderr.splitlines()


@pytest.fixture
def bank(built: tuple[Path, Any, Any], tmp_path: Path) -> Path:
    """A copy of that bank, to change; a bank is its file and the folder beside it."""
    return copied(built[0], tmp_path / "copy")


def copied(bank: Path, folder: Path) -> Path:
    folder.mkdir()
    with sqlite3.connect(bank) as source, sqlite3.connect(folder / bank.name) as target:
        source.backup(target)
    shutil.copytree(f"{bank}.weights", folder / f"{bank.name}.weights")
    return folder / bank.name


def records(kinprune: Cli, bank: Path) -> list[dict[str, Any]]:
    found = one_object(run(kinprune, "bank ls {bank} --json", bank=bank))
    assert found["bank"] == str(bank) and found["total"] == len(found["records"])
    return list(found["records"])


def test_build_makes_a_bank_and_says_so(built: tuple[Path, dict[str, Any], list[str]]) -> None:
    bank, said, lines = built
    assert set(said) == SUMMARY
    assert (said["bank"], said["added"], said["present"], said["records"]) == (str(bank), 2, 0, 2)
    assert sorted(path.name for path in bank.parent.iterdir() if not path.name.endswith(("-wal", "-shm"))) == [
        "bank.db",
        "bank.db.weights",
    ]
    entries = open_bank(bank).entries()
    for name, key in (("accuracy_dense", "dense"), ("accuracy_closed_form", "start"), ("accuracy", "final")):
        assert said[name] == pytest.approx(np.mean([getattr(entry.accuracy, key) for entry in entries]))
    assert said["seconds"] > said["seconds_per_task"] > 0
    assert lines[0] == f"{bank}: 0 records for test_resnet; source tasks asked for: 2"
    percent, seconds = r"\d+\.\d%", r"\d+\.\d s"
    for number, line in enumerate(lines[1:], start=1):
        wanted = f"{number}/2 fruit: whole {percent}, closed form {percent}, fine-tuned {percent}, {seconds}"
        assert re.fullmatch(wanted, line), line


def test_records_were_pruned_as_asked(built: tuple[Path, Any, Any]) -> None:
    for entry in open_bank(built[0]).entries():
        plan = entry.details["plan"]
        changed = {"rounds": 1, "recipe": {**asdict(SOURCE_PLAN.recipe), "steps": 1, "batch_size": 8}}
        assert plan == json.loads(json.dumps({**asdict(SOURCE_PLAN), **changed}))


def test_build_again_repeats_nothing_and_more_tasks_extend(kinprune: Cli, fruit: Path, bank: Path) -> None:
    before = records(kinprune, bank)
    command = f"bank build {{fruit}} --bank {{bank}} {DRAWN}"
    again = run(kinprune, f"{command} {MODEL} --tasks 2", fruit=fruit, bank=bank)
    assert again.exit_code == 0, again.output
    assert again.stdout == f"0 added to {bank}, 2 already there; 2 records in all.\n"
    assert records(kinprune, bank) == before
    more = run(kinprune, f"{command} --tasks 3", fruit=fruit, bank=bank)  # the bank knows its model
    assert more.exit_code == 0, more.output
    assert more.stdout.startswith(f"1 added to {bank}, 2 already there; 3 records in all.\nMean accuracy of the new: ")
    assert re.search(r"^3/3 fruit: ", more.stderr, re.MULTILINE) and "1/3" not in more.stderr
    after = records(kinprune, bank)
    assert after[:2] == before
    assert len({tuple(record["classes"]) for record in after}) == 3


def test_the_same_build_elsewhere_makes_the_same_records(
    kinprune: Cli, fruit: Path, built: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    """Keys, rankings and masks; with the weights in another place, which the bank then remembers."""
    command = f"bank build {{fruit}} --bank {{bank}} --store {{store}} {MODEL} {DRAWN} --tasks 1 --json"
    bank, store = tmp_path / "other.db", tmp_path / "store"
    one_object(run(kinprune, command, fruit=fruit, bank=bank, store=store))
    assert one_object(run(kinprune, command, fruit=fruit, bank=bank, store=store))["present"] == 1
    first, other = open_bank(built[0]), open_bank(bank)
    (entry,) = other.entries()
    assert entry.key == first.entries([1])[0].key
    ours, theirs = other.lessons([1]), first.lessons([1])
    assert np.array_equal(ours.rankings, theirs.rankings) and np.array_equal(ours.kept, theirs.kept)
    assert not Path(f"{bank}.weights").exists() and len(list(store.rglob("*.safetensors"))) == 2


def test_whole_sources_and_classes_left_out(
    kinprune: Cli, fruit: Path, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    shapes = make_folder(tmp_path / "shapes", ("cone", "cube", "ball"), 4, 36)
    folders = {"fruit": fruit, "shapes": shapes, "bank": tmp_path / "bank.db"}
    whole = f"bank build {{fruit}} {{shapes}} --bank {{bank}} {MODEL} {QUICK} --steps 0 --whole"
    assert one_object(run(kinprune, f"{whole} --leave-out plum,cube --json", **folders))["added"] == 2
    drawn = f"bank build {{fruit}} {{shapes}} --bank {{bank}} {DRAWN} --steps 0 --tasks 4 --leave-out pear"
    refused = run(kinprune, drawn, **folders)  # two of fruit's three are left: one pair
    assert refused.exit_code == 2 and "no 2 different tasks of 2" in refused.stderr
    assert one_object(run(kinprune, f"{drawn.replace('4', '2')} --json", **folders))["added"] == 2
    found = [(record["name"], set(record["classes"])) for record in records(kinprune, folders["bank"])]
    assert found[:3] == [("fruit", {"apple", "pear"}), ("shapes", {"cone", "ball"}), ("fruit", {"apple", "plum"})]
    assert found[3][0] == "shapes"


def test_a_build_makes_one_broad_task_of_each_source_too(
    kinprune: Cli, fruit: Path, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pair = make_folder(tmp_path / "pair", ("cone", "cube"), 10, 36)
    folders = {"fruit": fruit, "pair": pair, "bank": tmp_path / "bank.db"}
    command = f"bank build {{fruit}} {{pair}} --bank {{bank}} {MODEL} {QUICK} --classes 2 --tasks 2"
    said = run(kinprune, f"{command} --json", **folders)
    assert one_object(said)["added"] == 3 and "source tasks asked for: 3" in said.stderr
    broad, *drawn = open_bank(folders["bank"]).entries()
    assert set(broad.classes) == {"apple", "pear", "plum"} and [len(entry.classes) for entry in drawn] == [2, 2]
    steps = [entry.details["plan"]["recipe"]["steps"] for entry in (broad, *drawn)]
    assert steps == [BROAD_TIMES, 1, 1]  # the source of two classes is its own task of two
    again = one_object(run(kinprune, f"{command} --json", **folders))
    assert (again["added"], again["present"]) == (0, 3)
    other = one_object(run(kinprune, f"{command} --broad-steps 2 --json", **folders))
    assert (other["added"], other["present"]) == (1, 2)
    none = one_object(run(kinprune, f"{command} --broad-steps 0 --json", **folders))
    assert (none["added"], none["present"]) == (0, 2)
    alone = one_object(run(kinprune, f"{command} --tasks 0 --json", **folders))
    assert (alone["added"], alone["present"]) == (0, 1)
    refused = run(kinprune, f"{command} --tasks 0 --broad-steps 0", **folders)
    assert refused.exit_code == 2 and "nothing would be built" in refused.stderr
    refused = run(kinprune, f"bank build {{fruit}} --bank {{bank}} {MODEL} --whole --broad-steps 5", **folders)
    assert refused.exit_code == 2 and "leave out --tasks, --classes and --broad-steps" in refused.stderr


def test_add_one_whole_task(kinprune: Cli, fruit: Path, bank: Path) -> None:
    command = f"bank add {{fruit}} --bank {{bank}} {QUICK} --keep 30% --shots 4 --classes plum,pear,apple --json"
    added = one_object(run(kinprune, command, fruit=fruit, bank=bank))
    assert set(added) == SUMMARY and (added["added"], added["records"]) == (1, 3)
    found = records(kinprune, bank)[-1]
    assert found["classes"] == ["plum", "pear", "apple"] and found["images"] == {"train": 12, "test": 6}
    assert 0.25 < found["kept_share"] <= 0.3
    assert one_object(run(kinprune, command, fruit=fruit, bank=bank))["present"] == 1


def test_ls(kinprune: Cli, built: tuple[Path, Any, Any]) -> None:
    bank = built[0]
    found = records(kinprune, bank)
    assert [record["id"] for record in found] == [1, 2] and all(set(record) == LINE for record in found)
    assert all(record["images"] == {"train": 16, "test": 4} for record in found)
    newest = one_object(run(kinprune, "bank ls {bank} --limit 1 --json", bank=bank))
    assert newest["total"] == 2 and newest["records"] == found[1:]
    people = run(kinprune, "bank ls {bank} --limit 1", bank=bank)
    assert people.exit_code == 0 and people.stderr == ""
    assert max(map(len, people.stdout.replace(str(bank), "").splitlines())) <= 80
    (row,) = [line.split() for line in people.stdout.splitlines() if " fruit " in line]
    assert row[0] == "2" and f"{found[1]['kept_share']:.1%}" in row and found[1]["created"][:10] in row
    assert people.stdout.endswith(f"2 records in {bank}; these are the 1 newest (--before 2 lists older ones).\n")
    older = one_object(run(kinprune, "bank ls {bank} --before 2 --json", bank=bank))
    assert older == {"bank": str(bank), "total": 2, "records": found[:1]}
    page = run(kinprune, "bank ls {bank} --before 2", bank=bank).stdout
    assert page.endswith(f"2 records in {bank}; these are the 1 newest before 2.\n")


def test_show(kinprune: Cli, built: tuple[Path, Any, Any]) -> None:
    bank = built[0]
    found = one_object(run(kinprune, "bank show {bank} 2 --json", bank=bank))
    assert set(found) == LINE | {"bank", "weights", "kept", "groups", "details"}
    opened = open_bank(bank)
    assert found["groups"] == dict(opened.header.groups)
    kept = [index + start for (name, start) in starts(found["groups"]) for index in found["kept"][name]]
    assert kept == np.flatnonzero(opened.lessons([2]).kept[0]).tolist()
    assert found["kept_share"] == pytest.approx(len(kept) / sum(found["groups"].values()))
    people = run(kinprune, "bank show {bank} 2", bank=bank).stdout
    for part in (found["key"], found["weights"], "16 training, 4 test", "budget.keep 0.1", "layer4.0.conv1"):
        assert part in people


def starts(groups: dict[str, int]) -> list[tuple[str, int]]:
    return list(zip(groups, np.cumsum([0, *groups.values()]).tolist(), strict=False))


def test_info(kinprune: Cli, built: tuple[Path, Any, Any]) -> None:
    bank = built[0]
    found = one_object(run(kinprune, "bank info {bank} --json", bank=bank))
    opened = open_bank(bank)
    assert found["backbone"]["name"] == "test_resnet" and found["backbone"]["fingerprint"] == opened.header.backbone
    assert found["preprocessing"]["image_size"] == [32, 32] and found["schema"] == "0002"
    space = found["space"]
    assert (space["fingerprint"], space["stream"]) == (opened.header.space, False)
    assert sum(space["groups"].values()) == space["units"] == opened.header.units
    assert (found["records"], found["classes"]) == (2, 3)
    files = {path.stem: path.stat().st_size for path in Path(f"{bank}.weights").rglob("*.safetensors")}
    backbone = files.pop(opened.header.backbone_weights)
    assert found["bytes"]["backbone"] == backbone and found["bytes"]["weights"] == sum(files.values())
    assert found["bytes"]["database"] >= 4096
    people = run(kinprune, "bank info {bank}", bank=bank)
    assert people.exit_code == 0 and "32 x 32 pixels" in people.stdout and "2, of 3 different classes" in people.stdout
    assert found["under_way"] == 0 and "under way" not in people.stdout


def test_info_says_what_is_under_way(kinprune: Cli, bank: Path) -> None:
    opened = open_bank(bank)
    for key, seconds in (("a", 600.0), ("b", 600.0), ("c", 1e-6)):
        claim(opened, key, "a builder", seconds)
    assert one_object(run(kinprune, "bank info {bank} --json", bank=bank))["under_way"] == 2
    people = run(kinprune, "bank info {bank}", bank=bank)
    assert people.exit_code == 0 and "2 more, claimed by builders" in people.stdout


def answering(kinprune: Cli, monkeypatch: pytest.MonkeyPatch, answer: str, command: str, bank: Path) -> Any:
    """Run a command with somebody, or nobody, at the keyboard."""
    monkeypatch.setattr("kinprune.cli.bank.sys", SimpleNamespace(stdin=io.StringIO(answer)))
    return run(kinprune, command, bank=bank)


@pytest.mark.parametrize(
    ("answer", "code", "left", "says"),
    [("y\n", 0, [2], ""), ("n\n", 0, [1, 2], "nothing was removed"), ("", 2, [1, 2], "give --yes")],
)
def test_rm_asks(
    kinprune: Cli, bank: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: list[int], says: str
) -> None:
    result = answering(kinprune, monkeypatch, answer, "bank rm {bank} 1", bank)
    assert result.exit_code == code, result.output
    assert "1: fruit (" in result.stderr and "Remove it? [y/N]" in result.stderr and says in result.stderr
    assert [record["id"] for record in records(kinprune, bank)] == left


def test_rm_is_all_or_nothing(kinprune: Cli, bank: Path) -> None:
    refused = run(kinprune, "bank rm {bank} 1 7 2 9 --yes", bank=bank)
    assert refused.exit_code == 2 and "no record 7, 9: 'kinprune bank ls' lists them" in refused.stderr
    assert len(records(kinprune, bank)) == 2
    removed = one_object(run(kinprune, "bank rm {bank} 2 1 2 --yes --json", bank=bank))
    assert removed == {"bank": str(bank), "removed": [2, 1], "records": 0}
    assert len(list(Path(f"{bank}.weights").rglob("*.safetensors"))) == 1  # the backbone's
    empty = run(kinprune, "bank ls {bank}", bank=bank)
    assert empty.stdout == f"0 records in {bank}.\n"


def test_rm_takes_what_was_damaged(kinprune: Cli, bank: Path) -> None:
    with sqlite3.connect(bank) as file:
        file.execute("UPDATE record SET name = 'vegetables' WHERE id = 1")
    listed = run(kinprune, "bank ls {bank}", bank=bank)
    assert listed.exit_code == 2 and "kinprune bank rm BANK 1" in listed.stderr
    assert run(kinprune, "bank rm {bank} 1 --yes", bank=bank).stdout == "1 record removed, 1 left.\n"
    assert [record["id"] for record in records(kinprune, bank)] == [2]


def test_merge(kinprune: Cli, bank: Path, tmp_path: Path) -> None:
    first, second = copied(bank, tmp_path / "first"), copied(bank, tmp_path / "second")
    before = records(kinprune, bank)
    for part, number in ((first, 2), (second, 1)):
        one_object(run(kinprune, f"bank rm {{part}} {number} --yes --json", part=part))
    one_object(run(kinprune, "bank rm {bank} 1 2 --yes --json", bank=bank))
    merged = one_object(
        run(kinprune, "bank merge {bank} {first} {second} --json", bank=bank, first=first, second=second)
    )
    assert merged == {
        "bank": str(bank),
        "sources": [{"bank": str(part), "added": 1, "present": 0} for part in (first, second)],
        "records": 2,
    }
    numberless = [{name: value for name, value in record.items() if name != "id"} for record in before]
    assert [{n: v for n, v in record.items() if n != "id"} for record in records(kinprune, bank)] == numberless
    again = run(kinprune, "bank merge {bank} {first}", bank=bank, first=first)
    assert again.stdout == f"{first}: 0 added, 1 already there.\n2 records in {bank}.\n"
    assert one_object(run(kinprune, "bank verify {bank} --json", bank=bank))["whole"] is True


def test_merge_makes_the_bank_it_copies_into(kinprune: Cli, bank: Path, tmp_path: Path) -> None:
    new, store = tmp_path / "new.db", tmp_path / "weights"
    merged = one_object(
        run(kinprune, "bank merge {new} {bank} --store {store} --json", new=new, bank=bank, store=store)
    )
    assert merged["sources"] == [{"bank": str(bank), "added": 2, "present": 0}]
    made, source = open_bank(new).header, open_bank(bank).header
    assert (made.backbone, made.space, made.backbone_weights) == (
        source.backbone,
        source.space,
        source.backbone_weights,
    )
    numberless = [
        [{n: v for n, v in record.items() if n != "id"} for record in records(kinprune, one)] for one in (new, bank)
    ]
    assert numberless[0] == numberless[1] and not Path(f"{new}.weights").exists()
    assert one_object(run(kinprune, "bank verify {new} --json", new=new))["whole"] is True


def test_merge_refuses_another_backbone_before_anything(kinprune: Cli, fruit: Path, bank: Path, tmp_path: Path) -> None:
    other, extra = tmp_path / "other.db", copied(bank, tmp_path / "extra")
    command = (
        f"bank add {{fruit}} --bank {{other}} {QUICK} --steps 0 --model test_resnet --random --image-size 48 --json"
    )
    one_object(run(kinprune, command, fruit=fruit, other=other))
    one_object(run(kinprune, "bank rm {bank} 1 --yes --json", bank=bank))
    refused = run(kinprune, "bank merge {bank} {extra} {other}", bank=bank, extra=extra, other=other)
    assert refused.exit_code == 2 and refused.stdout == "" and "belongs to another backbone" in refused.stderr
    assert "image_size is (48, 48)" in refused.stderr
    assert len(records(kinprune, bank)) == 1


def test_verify_and_clean(kinprune: Cli, bank: Path) -> None:
    folder = Path(f"{bank}.weights")
    whole = run(kinprune, "bank verify {bank}", bank=bank)
    assert (whole.exit_code, whole.stdout) == (0, f"{bank} is whole: 2 records checked.\n")
    stray, young = (folder / (digit * 2) / f"{digit * 64}.safetensors" for digit in "ab")
    for path in (stray, young):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"nobody's")
    os.utime(stray, (time.time() - 200_000,) * 2)
    found = one_object(run(kinprune, "bank verify {bank} --json", bank=bank))
    assert set(found) == {"bank", "whole", "records", "problems", "unreferenced", "leftovers", "removed"}
    assert found["unreferenced"] == ["a" * 64, "b" * 64] and found["removed"] == []
    weights = next(path for path in folder.rglob("*.safetensors") if path.stem == open_bank(bank).entries()[0].weights)
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert run(kinprune, "bank verify {bank} --no-weights", bank=bank).exit_code == 0
    damaged = run(kinprune, "bank verify {bank} --clean", bank=bank)
    assert damaged.exit_code == 1 and stray.exists()
    assert re.match(r"record 1: .*not those that were stored", damaged.stdout) and "has 1 problem" in damaged.stdout
    as_json = run(kinprune, "bank verify {bank} --json", bank=bank)
    assert as_json.exit_code == 1
    (problem,) = json.loads(as_json.stdout)["problems"]
    assert problem["record"] == 1 and "not those that were stored" in problem["what"]
    weights.write_bytes(kept)
    cleaned = run(kinprune, "bank verify {bank} --clean", bank=bank)
    assert cleaned.exit_code == 0 and "1 unused files removed, 1 younger than a day left." in cleaned.stdout
    assert not stray.exists() and young.exists()


def test_upgrade(kinprune: Cli, bank: Path) -> None:
    said = one_object(run(kinprune, "bank upgrade {bank} --json", bank=bank))
    assert said == {"bank": str(bank), "before": "0002", "after": "0002"}
    assert run(kinprune, "bank upgrade {bank}", bank=bank).stdout == f"{bank} is up to date: schema 0002.\n"


NEW = f"bank build {{fruit}} --bank {{new}} {MODEL} {DRAWN} --tasks 2"
OLD = f"bank build {{fruit}} --bank {{bank}} {DRAWN} --tasks 2"
REFUSED = [
    ("no bank", "bank build {fruit} --model test_resnet", ["--bank"]),
    ("no data", f"bank build --bank {{new}} {MODEL}", ["DATA"]),
    ("no model", f"bank build {{fruit}} --bank {{new}} {DRAWN}", ["there is no bank at", "give --model"]),
    ("unknown model", f"{NEW.replace('test_resnet', 'test_resnett')}", ["'test_resnett'", "Did you mean"]),
    ("weights and random", f"{NEW} --weights {{place}}/x.safetensors", ["leave out --random"]),
    ("no weights file", f"{NEW.replace('--random', '--weights {place}/x.safetensors')}", ["x.safetensors does not"]),
    ("missing data", NEW.replace("{fruit}", "{place}/nowhere"), ["nowhere does not exist"]),
    ("one of two missing", NEW.replace("{fruit}", "{fruit} {place}/nowhere"), ["nowhere does not exist"]),
    ("one class", NEW.replace("{fruit}", "{place}/single"), ["'apple'", "at least two"]),
    ("data twice", NEW.replace("{fruit}", "{fruit} {fruit}"), ["given more than once"]),
    ("unknown class left out", f"{NEW} --leave-out apple,peer", ["no class 'peer'", "did you mean 'pear'"]),
    ("all left out", f"{NEW} --leave-out apple,pear,plum", ["fewer than two classes"]),
    ("too many tasks", f"{NEW} --tasks 4", ["3 classes", "no 4 different tasks of 2"]),
    ("too many classes", f"{NEW} --classes 4", ["no 2 different tasks of 4"]),
    ("one class a task", f"{NEW} --classes 1", ["'--classes'", "at least 2"]),
    ("no tasks", f"{NEW} --tasks 0 --broad-steps 0", ["nothing would be built"]),
    ("less than none", f"{NEW} --tasks -1", ["'--tasks'", "at least 0"]),
    ("whole and tasks", f"{NEW} --whole", ["--whole", "leave out --tasks, --classes"]),
    ("columns of a folder", f"{NEW} --label-column x", ["has no columns"]),
    ("no shots", f"{NEW} --shots 0", ["'--shots'", "at least 1"]),
    ("keep nothing", f"{NEW} --keep 0", ["'--keep'", "at most 1"]),
    ("method", f"{NEW} --method taylr", ["method 'taylr'", "taylor, "]),
    ("allocation", f"{NEW} --allocation even", ["allocation 'even'"]),
    ("optimiser", f"{NEW} --optimiser lion", ["'lion'"]),
    ("no workers", f"{NEW} --workers 0", ["'--workers'", "at least 1"]),
    ("threads of workers", f"{NEW} --workers 2 --threads 1", ["leave out --threads or --workers"]),
    ("device", f"{NEW} --device tpu", ["device 'tpu'"]),
    ("a folder as bank", NEW.replace("{new}", "{place}"), ["is a folder", "bank.db"]),
    ("in no folder", NEW.replace("{new}", "{place}/nowhere/b.db"), ["there is no folder", "--bank"]),
    ("no database", NEW.replace("{new}", "{place}/notes.txt"), ["notes.txt", "not a database"]),
    ("another database", NEW.replace("{new}", "{place}/other.sqlite"), ["is a database, but no bank"]),
    ("kind of database", NEW.replace("{new}", "mysql://me:secret@host/x"), ["'mysql'", "expected a file such as"]),
    (
        "unreachable",
        NEW.replace("{new}", "postgresql://me:secret@localhost:1/x"),
        ["me:***@localhost:1/x cannot be reached", "run the same command again"],
    ),
    ("unknown store", f"{NEW} --store nosuch://x", ["nosuch://x", "fsspec"]),
    ("another model", f"{OLD} --model test_vit --random", ["another backbone", "test_vit", "test_resnet"]),
    ("another size", f"{OLD} --model test_resnet --random --image-size 48", ["image_size is (48, 48)", "(32, 32)"]),
    ("other weights", f"{OLD} {MODEL} --seed 1", ["another backbone", "its weights are not those"]),
    ("size of the bank's model", f"{OLD} --image-size 48", ["--image-size", "leave out"]),
    ("another stream", f"{OLD} --stream", ["unit space", "without the residual stream"]),
    ("another store", f"{OLD} --store {{place}}/weights", ["--store", "leave out --store"]),
    ("add no such class", "bank add {fruit} --bank {bank} --classes apple,peer", ["did you mean 'pear'"]),
    ("add one class", "bank add {fruit} --bank {bank} --classes apple", ["at least two"]),
    ("add no class", "bank add {fruit} --bank {bank} --classes ,", ["at least two"]),
    ("add nothing", "bank add {place}/nowhere --bank {bank}", ["nowhere does not exist"]),
    ("add without a model", "bank add {fruit} --bank {new}", ["there is no bank at", "give --model"]),
    *(
        (f"{command.split()[0]} of no bank", f"bank {command}", ["there is no bank at", "new.db"])
        for command in (
            "ls {new}",
            "show {new} 1",
            "rm {new} 1 --yes",
            "verify {new}",
            "info {new}",
            "upgrade {new}",
        )
    ),
    ("merge from no bank", "bank merge {bank} {bank} {new}", ["there is no bank at", "new.db"]),
    ("merge into no bank from none", "bank merge {new} {place}/none.db", ["there is no bank at", "none.db"]),
    ("merge into a folder that is not there", "bank merge {place}/none/b.db {bank}", ["there is no folder"]),
    ("merge with a store", "bank merge {bank} {bank} --store {new}", ["leave out --store"]),
    ("merge from nothing", "bank merge {bank}", ["SOURCE"]),
    ("shares without Ray", "bank build {fruit} --bank {bank} --task-cpus 2", ["give --ray"]),
    ("workers with Ray", "bank build {fruit} --bank {bank} --ray local --workers 2", ["leave out --workers"]),
    ("a GPU with Ray", "bank build {fruit} --bank {bank} --ray local --device cuda", ["give --task-gpus 1"]),
    ("Ray nowhere", "bank build {fruit} --bank {bank} --ray nowhere", ["expected local, auto", "HOST:PORT"]),
    (
        "no cluster for a new bank",
        f"bank build {{fruit}} --bank {{new}} {MODEL} --ray 127.0.0.1:1",
        ["no Ray cluster can be used at 127.0.0.1:1", "ray start --head"],
    ),
    ("a share above one", "bank build {fruit} --bank {bank} --ray auto --task-gpus 1.5", ["whole ones"]),
    ("show no record", "bank show {bank} 99", ["no record 99"]),
    ("show no number", "bank show {bank} first", ["'first'", "at least 1"]),
    ("rm no record", "bank rm {bank} 1 99", ["no record 99"]),
    ("ls none", "bank ls {bank} --limit 0", ["'--limit'", "at least 1"]),
    ("upgrade another database", "bank upgrade {place}/other.sqlite", ["is a database, but no bank"]),
    ("unknown command", "bank list {bank}", ["'list'"]),
]


@pytest.fixture(scope="module")
def place(make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is no bank, and no data."""
    folder = tmp_path_factory.mktemp("place")
    make_folder(folder / "single", ("apple",), 3)
    (folder / "notes.txt").write_text("this is no database, and long enough to be seen for what it is\n" * 20)
    with sqlite3.connect(folder / "other.sqlite") as file:
        file.execute("CREATE TABLE thing (id INTEGER)")
    return folder


def contents(folder: Path) -> dict[str, bytes | list[str] | None]:
    """Every path below a folder, with the bytes of files; of a bank its rows, as SQLite moves pages about."""
    paths = (path for path in sorted(folder.rglob("*")) if not path.name.endswith(("-wal", "-shm")))
    return {str(path.relative_to(folder)): content(path) for path in paths}


def content(path: Path) -> bytes | list[str] | None:
    if path.suffix != ".db" or path.stat().st_size == 0:
        return path.read_bytes() if path.is_file() else None
    with contextlib.closing(sqlite3.connect(path)) as file:
        return list(file.iterdump())


@pytest.mark.parametrize(("command", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused(
    kinprune: Cli,
    built: tuple[Path, Any, Any],
    fruit: Path,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    says: list[str],
) -> None:
    """One message, exit code 2, and not a file made or changed."""
    monkeypatch.setattr("kinprune.bank.retrying.RETRY_SECONDS", 0.0)
    bank = built[0]
    watched = [tmp_path, place, bank.parent]
    before = [contents(folder) for folder in watched]
    result = run(kinprune, command, fruit=fruit, bank=bank, new=tmp_path / "new.db", place=place)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr and "secret" not in result.stderr
    assert all(part in result.stderr for part in says), result.stderr
    assert [contents(folder) for folder in watched] == before


def test_a_task_that_fails_stops_no_other(kinprune: Cli, make_folder: Callable[..., Path], tmp_path: Path) -> None:
    """An image that cannot be read is only found when it is decoded: what can be done is, and what cannot is said."""
    good, bad = (make_folder(tmp_path / name, ("apple", "pear"), 4, 36) for name in ("good", "bad"))
    (bad / "pear" / "0001.png").write_bytes(b"this is no image")
    command = f"bank build {{bad}} {{good}} --bank {{bank}} {MODEL} {QUICK} --steps 0 --whole"
    result = run(kinprune, command, good=good, bad=bad, bank=tmp_path / "bank.db")
    assert result.exit_code == 2 and result.stdout == ""
    first, last = result.stderr.splitlines()[-2:]
    assert first == (
        "kinprune: 1 source task could not be read, all others were done (1 record is in the bank; run the same "
        "command again to go on):"
    )
    assert "pear/0001.png" in last


def script() -> list[str]:
    """The console script, or what it does where the package is not installed."""
    found = shutil.which("kinprune", path=str(Path(sys.executable).parent))
    return [found] if found else [sys.executable, "-c", "from kinprune.cli import main; main()"]


def environment() -> dict[str, str]:
    source = str(Path(kp.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "TERM": "xterm"}


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT")
def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    words = shlex.split(
        f"bank build {fruit} --bank bank.db {MODEL} {DRAWN} --round-steps 5 --rounds 2 --tasks 3 --json"
    )
    process = subprocess.Popen(
        [*script(), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment()
    )
    said = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if line.startswith("1/3 "):
                process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stdout) == (130, ""), said
    bank = tmp_path / "bank.db"
    found = re.fullmatch(
        r"kinprune: interrupted; ([12]) records? (is|are) in the bank; run the same command again to go on\n", said[-1]
    )
    assert found is not None, said
    kept = records(kinprune, bank)
    assert len(kept) == int(found[1])
    words[words.index("bank.db")] = str(bank)
    summary = one_object(kinprune(*words))
    assert (summary["added"], summary["present"]) == (3 - len(kept), len(kept))
    assert records(kinprune, bank)[: len(kept)] == kept


def test_help_says_the_defaults_there_are_and_imports_nothing_heavy(kinprune: Cli) -> None:
    shown = " ".join(kinprune("bank", "build", "--help").stdout.split())
    recipe = SOURCE_PLAN.recipe
    for option, value in (
        ("--keep SHARE", SOURCE_PLAN.budget.keep),
        ("--rounds N", SOURCE_PLAN.rounds),
        ("--round-steps N", SOURCE_PLAN.round_steps),
        ("--method NAME", SOURCE_PLAN.criterion),
        ("--allocation NAME", SOURCE_PLAN.allocation),
        ("--multiple N", SOURCE_PLAN.multiple),
        ("--steps N", recipe.steps),
        ("--batch-size N", recipe.batch_size),
        ("--optimiser NAME", recipe.optimiser),
        ("--tasks N", bank_options.TASKS),
        ("--classes N", bank_options.CLASSES),
    ):
        assert re.search(rf" {option} [^\]]*\[default: {re.escape(str(value))}\]", shown), option
    assert recipe.flip is False and recipe.learning_rate is None
    program = (
        "import sys\nfrom kinprune.cli.app import app\napp(['bank', 'build', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'sqlalchemy', 'fsspec'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "[]\n")
    titles = [line.rstrip(":") for line in done.stdout.splitlines() if line and not line.startswith((" ", "Usage"))]
    assert titles == ["Arguments", "Data", "Model", "Pruning", "Fine-tuning", "Running and output", "Help"]
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_nothing_given_is_the_source_plan() -> None:
    assert bank_options.plan_of(seed=0, stream=False, flip=False, keep=None, steps=None, rounds=None) == SOURCE_PLAN
    other = bank_options.plan_of(seed=3, stream=True, flip=True, keep=0.2, steps=0, criterion="l1", learning_rate=0.1)
    recipe = other.recipe
    assert (other.budget.keep, other.criterion, other.stream, other.rounds) == (0.2, "l1", True, SOURCE_PLAN.rounds)
    assert (recipe.seed, recipe.flip, recipe.steps, recipe.learning_rate) == (3, True, 0, 0.1)


@pytest.mark.parametrize(
    ("elapsed", "finished", "remaining", "workers", "left"),
    [
        (10, 1, 9, 1, 90),
        (60, 4, 0, 1, 0),
        # Four workers: the first to finish after 10 s has three others half way; 96 and a half remain at a quarter of
        # a task a second: 2.5 done in 10 s.
        (10, 1, 98, 4, 386),
        (100, 20, 2, 4, 100 / 21),  # two left, both under way and half done
        (100, 20, 0, 4, 0),
    ],
)
def test_time_left(elapsed: float, finished: int, remaining: int, workers: int, left: float) -> None:
    assert time_left(elapsed, finished, remaining, workers) == pytest.approx(left)


def test_time_left_is_right_once_workers_are_out_of_step() -> None:
    """Against tasks of 7 to 13 s on four workers, played through: within a tenth, half-way."""
    seconds = np.random.default_rng(0).uniform(7, 13, 200)
    free, ends = np.zeros(4), []
    for task in seconds:
        worker = int(free.argmin())
        free[worker] += task
        ends.append(float(free[worker]))
    ends.sort()
    assert time_left(ends[99], 100, 100, 4) == pytest.approx(ends[-1] - ends[99], rel=0.1)
    assert time_left(ends[0], 1, 199, 4) == pytest.approx(ends[-1] - ends[0], rel=0.5)


def test_a_broad_task_counts_as_much_as_it_takes() -> None:
    """Ten times the work of each of the nine to come took 1,000 s: 900 s are left, not 9,000."""
    left = bank_progress._estimate()
    accuracy = Accuracy(0.9, 0.5, 0.8)
    assert left(Done("broad", accuracy, 1000.0, True, work=1300, remaining=9 * 130), 9) == "15 min"
    assert left(Done("narrow", accuracy, 100.0, True, work=130, remaining=8 * 130), 8) == "12 min"
    assert left(Done("narrow", accuracy, 100.0, True, work=130, remaining=0), 0) == "0 s"


def test_durations() -> None:
    values = (0.4, 45, 89, 90, 600, 5369, 5400, 12_600)
    assert [duration(value) for value in values] == [
        "0 s",
        "45 s",
        "89 s",
        "2 min",
        "10 min",
        "89 min",
        "1.5 h",
        "3.5 h",
    ]
