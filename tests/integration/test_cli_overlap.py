"""``kinprune overlap`` on a bank: the pair, the study, the picture; bad input refused before any work."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinprune.backbones import load_backbone
from kinprune.bank import open_bank
from kinprune.overlap_study import study_overlap, summarise_study
from kinprune.units import UnitSpace, find_units

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from overlap_bank import family_records, make_bank

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UnitSpace]:
    """A bank of three families of four tasks, ids 1 to 4, 5 to 8, 9 to 12; and its unit space."""
    path = tmp_path_factory.mktemp("bank") / "bank.db"
    backbone = load_backbone("tiny_net:tiny", num_classes=3, image_size=16)
    space = find_units(backbone.model, backbone.preprocessing.image_size, head=backbone.head)
    make_bank(path, backbone, space, family_records(backbone, space, 3, 4, units=0.9)).close()
    return path, space


def test_a_study_as_the_library_makes_it(kinprune: Cli, made: tuple[Path, UnitSpace], tmp_path: Path) -> None:
    bank, space = made
    out = tmp_path / "overlap.html"
    result = kinprune("overlap", "--bank", bank, "--keep", "50%", "--pairs", 50, "--seed", 3, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    opened = open_bank(bank)
    expected = summarise_study(study_overlap(opened, space, keep=0.5, pairs=50, seed=3))
    assert found == {"bank": str(bank), "out": str(out), "seed": 3, **json.loads(json.dumps(expected))}
    assert (found["pairs"], found["possible_pairs"]) == (50, 66)
    page = out.read_text()
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert "tiny_net:tiny" in page


def test_for_people(kinprune: Cli, made: tuple[Path, UnitSpace], tmp_path: Path) -> None:
    out = tmp_path / "overlap.svg"
    out.write_text("old")
    result = kinprune("overlap", "--bank", made[0], "--out", out, "--overwrite")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    for expected in ("12 tasks, all 66 pairs; the units that each pruned model kept.", "second", "rank correlation"):
        assert expected in words
    assert ElementTree.parse(out).getroot().tag.endswith("svg")


def test_two_tasks(kinprune: Cli, made: tuple[Path, UnitSpace]) -> None:
    result = kinprune("overlap", "--bank", made[0], "--tasks", "3,1", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [task["id"] for task in found["tasks"]] == [3, 1] and found["shared"] == ["a 0", "b 0"]
    assert [group["name"] for group in found["groups"]] == [group.name for group in made[1].groups]
    kept = open_bank(made[0]).lessons([3, 1]).kept
    for place, group in enumerate(found["groups"]):
        a, b = (made[1].split(mask)[place] for mask in kept)
        assert group["overlap"] == (a & b).sum() / (a | b).sum()
    shown = kinprune("overlap", "--bank", made[0], "--tasks", "3,1")
    assert shown.exit_code == 0 and "Shared classes: a 0, b 0." in shown.stdout and "kept by 3" in shown.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--bank {folder}/none.db", "there is no bank"),
        ("--bank {bank} --tasks 1,99", "no record 99"),
        ("--bank {bank} --tasks 1,x", "'x', expected a whole number"),
        ("--bank {bank} --tasks 1", "two numbers of records or more"),
        ("--bank {bank} --tasks 2,2,3", "name one twice"),
        ("--bank {bank} --keep 0", "expected a share above 0"),
        ("--bank {bank} --keep 1.2", "expected a share above 0"),
        ("--bank {bank} --pairs 0", "whole number of at least 1"),
        ("--bank {bank} --out {folder}/x.png", "expected a picture's"),
        ("--bank {bank} --out {folder}/there.svg", "--overwrite"),
        ("--bank {bank} --tasks 1,2 --out {folder}/x.svg", "two tasks are one"),
    ],
)
def test_bad_input_is_refused(
    kinprune: Cli, made: tuple[Path, UnitSpace], tmp_path: Path, words: str, says: str
) -> None:
    (tmp_path / "there.svg").write_text("mine")
    result = kinprune("overlap", *words.format(bank=made[0], folder=tmp_path).split())
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.replace("│", " ").split()), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there.svg"]
    assert (tmp_path / "there.svg").read_text() == "mine"
