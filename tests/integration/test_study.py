"""The study runs whole on a tiny model, goes on after a kill without repeating a run, and says what its rows say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
KNOWN, UNSEEN = ("ant", "bat", "cow", "dog"), ("apple", "fig", "pear", "plum", "quince", "sloe")
METHODS = ["smsp", "smsp, narrow tasks alone", "smsp, the broad task alone", "taylor", "scratch", "whole model"]


@pytest.fixture(autouse=True)
def from_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@dataclass(frozen=True)
class Study:
    """A protocol of its own with its data and weights; ``words`` run it."""

    folder: Path
    words: tuple[str, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / "rows.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def start(self, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.study", *self.words, *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **ONE})


ONE = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def study(make_folder: Callable[..., Path], tmp_path: Path) -> Study:
    make_folder(tmp_path / "data" / "things", (*KNOWN, *UNSEEN), 10, 36)
    (tmp_path / "weights").mkdir()
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "weights" / "tiny.safetensors")
    things = {"data": "things", "label_column": None, "classes": 2}
    protocol = {
        "bank": {
            **{"file": "tiny.db", "model": "test_resnet", "weights": "tiny.safetensors", "image_size": 32},
            **{**things, "tasks": 3, "shots": 6, "broad_steps": 2, "left_out": UNSEEN},
        },
        "targets": {
            **{**things, "shots": 6, "unseen": True, "seed": 0},
            **{"validation_classes": 3, "validation": 2, "test": 2},
        },
        "parts": [
            {"stage": "validation", "methods": METHODS, "steps": [1]},
            {"stage": "validation", "methods": ["smsp"], "steps": [1, 2], "keep": [0.3], "sources": [None, 2]},
        ],
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(protocol))
    words = [str(path)]
    for name in ("data", "weights", "banks"):
        words += [f"--{name}", str(tmp_path / name)]
    return Study(tmp_path, (*words, "--out", str(tmp_path / "rows.jsonl")))


def test_a_killed_study_goes_on_and_repeats_nothing(study: Study) -> None:
    process = study.start()
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = study.rows
    assert before
    with (study.folder / "rows.jsonl").open("a") as file:
        file.write('{"cut off by the')
    done = study.start()
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    rows = study.rows
    assert rows[: len(before)] == before
    found = json.loads(out)
    assert found["runs"] == len(rows) - len(before) and found["rows"] == len(rows) == 2 * (len(METHODS) + 2)
    names = [(tuple(row["classes"]), row["method"], row["keep"], row["sources"]) for row in rows]
    assert len(set(names)) == len(names)
    assert all({*row["classes"]} <= {*UNSEEN} for row in rows) and rows[0]["records"] == 4
    for row in rows:
        steps = {"scratch": ["1"]}.get(row["method"], ["0", "1"] if row["keep"] == 0.1 else ["0", "1", "2"])
        assert list(row["accuracy"]) == steps and all(0 <= value <= 1 for value in row["accuracy"].values())
    similar = {
        row["method"]: len(row["details"]["similarity"]) for row in rows if "similarity" in row.get("details", {})
    }
    assert similar["smsp, narrow tasks alone"] == 3 and similar["smsp, the broad task alone"] == 1
    page = (study.folder / "rows.md").read_text()
    assert "| taylor | 2 |" in page and "2 source tasks" in page
    again = study.start()
    assert json.loads(again.communicate(timeout=120)[0])["runs"] == 0


def test_two_shares_are_the_whole(study: Study) -> None:
    from benchmarks.study.protocol import read_protocol
    from benchmarks.study.running import Places, open_or_build, plan_runs, run_protocol

    protocol = read_protocol(str(study.folder / "tiny.json"))
    places = Places(*(study.folder / name for name in ("data", "weights", "banks", "rows.jsonl")))
    bank = open_or_build(protocol, places)
    assert len(bank) == len(open_or_build(protocol, places)) == 4
    assert max(len(entry.classes) for entry in bank.entries()) == len(KNOWN)
    made = [run_protocol(protocol, bank, places, "validation", (part, 2)) for part in range(2)]
    assert sum(made) == len(plan_runs(protocol, bank, places.data, "validation")) and min(made) > 0
    assert run_protocol(protocol, bank, places, "validation") == 0


def test_steps_asked_for_later_are_all_that_is_run_again(study: Study) -> None:
    from benchmarks.study.protocol import read_protocol
    from benchmarks.study.running import Places, open_or_build, read_rows, run_protocol

    protocol = read_protocol(str(study.folder / "tiny.json"))
    places = Places(*(study.folder / name for name in ("data", "weights", "banks", "rows.jsonl")))
    bank = open_or_build(protocol, places)
    part = replace(protocol.parts[0], methods=("taylor",), tasks=1)
    for steps, made in (((1,), 1), ((2,), 1), ((1, 2), 0)):
        assert run_protocol(replace(protocol, parts=(replace(part, steps=steps),)), bank, places, "validation") == made
    assert [list(row["accuracy"]) for row in study.rows] == [["0", "1"], ["0", "2"]]
    (row,) = read_rows(places.rows)
    assert list(row["accuracy"]) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"validation": 4}, "3 classes of things are left for the validation tasks: no 4 different tasks of 2"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_run_is_refused_in_words(study: Study, change: dict[str, Any], told: str) -> None:
    path = study.folder / "tiny.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "targets": {**content["targets"], **change}}))
    process = study.start()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err and told in err
    assert not study.rows


def test_fewer_sources_are_narrow_ones_and_nest(study: Study) -> None:
    from benchmarks.study.protocol import read_protocol
    from benchmarks.study.running import Places, open_or_build
    from benchmarks.study.starts import hidden

    protocol = read_protocol(str(study.folder / "tiny.json"))
    places = Places(*(study.folder / name for name in ("data", "weights", "banks", "rows.jsonl")))
    bank = open_or_build(protocol, places)
    broad = {entry.key for entry in bank.entries() if len(entry.classes) > 2}
    assert hidden(bank, None, None) == [] and set(hidden(bank, "broad", None)) == broad
    assert set(hidden(bank, "narrow", None)) == bank.keys() - broad
    one, two = (set(hidden(bank, None, count)) for count in (1, 2))
    assert two < one and len(two) == 1 and not one & broad


def test_validation_and_test_tasks_share_no_class(study: Study) -> None:
    from benchmarks.study.protocol import read_protocol
    from benchmarks.study.running import Places, open_or_build
    from benchmarks.study.targets import draw_targets

    protocol = read_protocol(str(study.folder / "tiny.json"))
    places = Places(*(study.folder / name for name in ("data", "weights", "banks", "rows.jsonl")))
    bank = open_or_build(protocol, places)
    drawn = [draw_targets(protocol.targets, bank, places.data, stage) for stage in ("validation", "test")]
    classes = [{name for task in tasks for name in task.classes} for tasks in drawn]
    assert not classes[0] & classes[1] and classes[0] | classes[1] <= {*UNSEEN}
    assert all(len(set(tasks)) == 2 for tasks in drawn)
    assert drawn[0] == draw_targets(protocol.targets, bank, places.data, "validation")


def test_every_protocol_of_the_study_can_be_read() -> None:
    from benchmarks.study.protocol import HERE, read_protocol

    names = [path.stem for path in (HERE / "protocols").glob("*.json")]
    assert names
    for name in names:
        assert read_protocol(name).parts


def test_a_protocol_that_asks_for_what_nobody_knows_is_refused(study: Study) -> None:
    path = study.folder / "tiny.json"
    content = json.loads(path.read_text())
    content["parts"][0]["methods"] = ["magic"]
    path.write_text(json.dumps(content))
    from benchmarks.study.protocol import read_protocol

    with pytest.raises(ValueError, match="no method 'magic'"):
        read_protocol(str(path))
    with pytest.raises(ValueError, match=r"expected one of .*vit"):
        read_protocol("nothing")


def test_differences_are_paired_and_sure_only_where_the_interval_says_so() -> None:
    from benchmarks.study.statistics import difference

    tasks = range(8)
    first = {task: 0.5 + task / 20 for task in tasks}
    found = difference(first, {task: value - 0.02 for task, value in first.items()})
    assert found is not None and found.sure and str(found) == "+2.0 (+2.0 to +2.0)"
    noisy = difference(first, {task: value + (0.1 if task % 2 else -0.1) for task, value in first.items()})
    assert noisy is not None and not noisy.sure and noisy.mean == pytest.approx(0, abs=1e-9)
    assert difference(first, {99: 0.1}) is None


def test_steps_added_later_join_their_row() -> None:
    from benchmarks.study.statistics import merge

    row = {
        **{"protocol": "p", "stage": "test", "classes": ["a", "b"], "method": "m", "keep": 0.1},
        **{"shots": None, "sources": None, "accuracy": {"0": 0.4, "15": 0.5}},
    }
    (merged,) = merge([row, {**row, "accuracy": {"0": 0.4, "60": 0.6}}])
    assert merged["accuracy"] == {"0": 0.4, "15": 0.5, "60": 0.6}
