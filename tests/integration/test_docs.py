"""Every command and every snippet of the documentation runs, in order, in a directory like a reader's."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from kinprune.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return _BLOCK.findall(page.read_text())


@pytest.fixture
def reader(tmp_path: Path, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the documentation says a reader has: the starter, two folders of photos and a file of weights."""
    home = tmp_path
    shutil.copytree(ROOT / "starter", home / "starter")
    make_folder(home / "photos", ["bird", "cat", "dog"], 8, size=48)
    make_folder(home / "new-photos", ["fox", "hen"], 8, size=48)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("mobilenetv2_100")
    save_file(model.state_dict(), home / "mobilenetv2_100.safetensors", {"architecture": "mobilenetv2_100"})
    monkeypatch.chdir(home)
    return home


def run(page: Path) -> int:
    """Run a page's commands and snippets, in order, and return how many there were."""
    ran = 0
    for language, text in blocks(page):
        if language == "console":
            for line in text.splitlines():
                program, *arguments = shlex.split(os.path.expandvars(line.removeprefix("$ ")))
                assert program == "kinprune", line
                result = CliRunner().invoke(app, arguments, catch_exceptions=False)
                assert result.exit_code == 0, f"{line}\n{result.output}"
                ran += 1
        elif language == "python":
            exec(compile(text, page.name, "exec"), {"__name__": "__main__"})
            ran += 1
    return ran


def test_the_readme_runs(reader: Path) -> None:
    assert run(ROOT / "README.md") >= 17


def test_the_page_for_teams_runs(
    reader: Path, make_database: Callable[[], str], s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL, S3 and Ray, all of them on this machine."""
    monkeypatch.setenv("BANK", make_database())
    monkeypatch.setenv("STORE", s3())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run(ROOT / "docs" / "team.md") >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for _, text in blocks(page):
        for named in re.findall(r"^make ([a-z]+)", text, re.MULTILINE):
            assert named in targets, f"{page.name} names make {named}"


def test_the_map_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in sorted((ROOT / "src" / "kinprune").iterdir()):
        if path.name.startswith(("__", "py.typed", ".")):
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert f"`{name}`" in page, f"docs/architecture.md does not name {name}"
