"""Banks of a tiny network, on both databases."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kinprune.backbones import Backbone, load_backbone
from kinprune.bank import Bank, Record, create_bank
from kinprune.units import UnitSpace, find_units

DATA = Path(__file__).resolve().parents[2] / "data"
SIZE = 16


@dataclass(frozen=True)
class Place:
    """Where a test's bank is: an address for ``open_bank``, and the folder of its weights."""

    kind: str
    address: str
    store: str | None
    weights: Path


@pytest.fixture(scope="session", autouse=True)
def tiny_net() -> None:
    """Make ``tiny_net:tiny`` importable, the factory that the stored bank names too."""
    if str(DATA) not in sys.path:
        sys.path.insert(0, str(DATA))


@pytest.fixture(scope="session")
def backbone(tiny_net: None) -> Backbone:
    return load_backbone("tiny_net:tiny", num_classes=3, image_size=SIZE)


@pytest.fixture(scope="session")
def space(backbone: Backbone) -> UnitSpace:
    return find_units(backbone.model, backbone.preprocessing.image_size, head=backbone.head)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place without a bank yet."""
    if request.param == "sqlite":
        return Place("sqlite", str(tmp_path / "bank.db"), None, tmp_path / "bank.db.weights")
    address = request.getfixturevalue("make_database")()
    return Place("postgresql", address, str(tmp_path / "weights"), tmp_path / "weights")


@pytest.fixture
def bank(place: Place, backbone: Backbone, space: UnitSpace) -> Bank:
    """An empty bank."""
    return create_bank(place.address, backbone, space, store=place.store)


@pytest.fixture
def sqlite_bank(tmp_path: Path, backbone: Backbone, space: UnitSpace) -> Bank:
    """An empty bank in a file, ``tmp_path / "bank.db"``."""
    return create_bank(tmp_path / "bank.db", backbone, space)


@pytest.fixture(scope="session")
def make_record(backbone: Backbone, space: UnitSpace) -> Callable[..., Record]:
    """``make_record(seed, **changed)``: a record of random numbers that fits the tiny network."""
    from tiny_net import random_record

    return lambda seed=0, **changed: random_record(backbone, space, seed, **changed)
