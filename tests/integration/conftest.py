"""What the tests of the whole way share: the command line in this process, and a small task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kinprune.cli.app import app

CLASSES = ("apple", "pear", "plum")


@pytest.fixture(scope="session")
def kinprune() -> Callable[..., Any]:
    """``kinprune("eval", folder, ...)``: run a command; the result has ``exit_code``, ``stdout`` and ``stderr``."""
    runner = CliRunner()
    return lambda *words: runner.invoke(app, [str(word) for word in words], prog_name="kinprune")


@pytest.fixture(scope="session")
def fruit(tmp_path_factory: pytest.TempPathFactory, make_folder: Callable[..., Path]) -> Path:
    """A folder of three classes that can be told apart, ten images each."""
    return make_folder(tmp_path_factory.mktemp("data") / "fruit", CLASSES, 10, 36)
