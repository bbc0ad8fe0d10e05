"""The public names: each is there, and none costs anything before it is used."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kinprune


def in_a_new_process(program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(kinprune.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names_are_sorted_and_listed_once() -> None:
    assert list(kinprune.__all__) == sorted(set(kinprune.__all__))


@pytest.mark.parametrize("name", kinprune.__all__)
def test_every_name_is_there(name: str) -> None:
    value = getattr(kinprune, name)
    home = value.__module__
    assert home.startswith("kinprune.")
    assert value.__doc__, f"{name} has no docstring"
    assert getattr(importlib.import_module(home), name) is value
    assert name in dir(kinprune)


def test_importing_the_library_is_light() -> None:
    heavy = "{'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'rich', 'typer'}"
    assert in_a_new_process(f"import sys, kinprune; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_a_star_import_gives_every_name() -> None:
    assert (
        in_a_new_process("from kinprune import *; import kinprune; print(set(kinprune.__all__) <= set(dir()))")
        == "True"
    )


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'kinprune' has no attribute 'prun'"):
        _ = kinprune.prun  # type: ignore[attr-defined]


def test_the_version_is_the_packages() -> None:
    assert kinprune.__version__[0].isdigit()
