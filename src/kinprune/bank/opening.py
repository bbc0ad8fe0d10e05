"""Banks made and opened: what an address and a place for weights are, and the header that says what a bank is about."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection, Engine, insert, inspect, select
from sqlalchemy.engine import URL
from torch import Tensor

from kinprune.backbones import Backbone, BackboneSpec
from kinprune.backbones.checkpoint import Hints
from kinprune.backbones.inputs import resolve_preprocessing
from kinprune.bank import schema
from kinprune.bank.coding import seal
from kinprune.bank.migrating import upgrade
from kinprune.bank.record import Header
from kinprune.bank.retrying import retried, retry
from kinprune.bank.rows import now
from kinprune.bank.storage import Bank
from kinprune.bank.weights import WeightStore, digest_of, pack
from kinprune.errors import BankError
from kinprune.units import UnitSpace

PAGE = 32_768
"""Bytes of a page of a SQLite file: usual probes lie whole in one, and are read twice as fast as from 4,096."""


def create_bank(
    address: str | Path, backbone: Backbone, space: UnitSpace, *, stream: bool = False, store: str | None = None
) -> Bank:
    """Make a new bank for a backbone and its unit space, and open it.

    ``address`` is a file's path or a database's URL. ``store`` is where weights go, any address fsspec knows; beside
    a SQLite file where none is given. The backbone's own weights are stored too, so that a bank can be used alone.

    Raises:
        BankError: there is a bank already, or the address cannot be used.
    """
    stored = pack(_stored_backbone(backbone), {"architecture": backbone.spec.architecture}, lossless=True)
    head = backbone.model.get_parameter(f"{backbone.head}.weight")
    header = Header(
        spec=backbone.spec,
        preprocessing=backbone.preprocessing,
        backbone=backbone.fingerprint,
        space=space.fingerprint,
        stream=stream,
        groups=tuple((group.name, group.size) for group in space.groups),
        features=int(head.shape[1]),
        backbone_weights=digest_of(stored),
    )
    return _create(address, header, stored, store)


def create_like(address: str | Path, source: Bank, *, store: str | None = None) -> Bank:
    """Make a new bank of another's backbone and units, without its records, and open it; see ``create_bank``."""
    return _create(address, source.header, source.store.get(source.header.backbone_weights), store)


def _create(address: str | Path, header: Header, stored: bytes, store: str | None) -> Bank:
    """``stored`` is the file of the backbone's weights."""
    url = schema.parse_address(address)
    place = _store_of(url, store)
    if url.database and url.get_backend_name() == "sqlite":
        _check_folder(Path(url.database))
    with schema.connected(url) as engine:
        _check_free(engine)
        weights = WeightStore(_resolved(url, place))
        if store is not None and next(weights.digests(), None) is not None:
            raise BankError(
                f"{place} holds weights already: give the bank a folder of its own, for what its records do not refer "
                "to is removed there; a bank whose making broke off leaves one file, which you can remove"
            )
        weights.put(stored)
        _create_tables(engine, header, place)
    return open_bank(address)


@retried
def bank_exists(address: str | Path) -> bool:
    """Whether there is something at an address that ``open_bank`` is to open, or to refuse; else it is free."""
    url = schema.parse_address(address)
    if url.get_backend_name() == "sqlite":
        path = Path(url.database or "")
        return path.is_file() and path.stat().st_size > 0
    with schema.connected(url) as engine, schema.reading(engine) as connection:
        return inspect(connection).has_table("bank")


@retried
def open_bank(address: str | Path) -> Bank:
    """Open a bank. BankError where there is none, or one of another schema version."""
    url = schema.parse_address(address)
    name = schema.shown(url)
    if url.database and url.get_backend_name() == "sqlite" and not Path(url.database).is_file():
        raise BankError(f"there is no bank at {url.database}: make one with 'kinprune bank build', or correct the path")
    with schema.connected(url) as engine, schema.reading(engine) as connection:
        if not inspect(connection).has_table("alembic_version") or not inspect(connection).has_table("bank"):
            raise BankError(f"{name} is a database, but no bank: make one with 'kinprune bank build'")
        version = schema.read_version(connection)
        if version != schema.VERSION:
            older = version < schema.VERSION
            raise BankError(
                f"{name} has the schema {version}, expected {schema.VERSION}: "
                + ("run 'kinprune bank upgrade' on it" if older else "it was made by a newer Kinprune, upgrade that")
            )
        row = connection.execute(select(schema.bank).where(schema.bank.c.id == 1)).one_or_none()
    if row is None or seal("bank", "header", row.header, row.store) != row.seal:
        raise BankError(f"the header of {name} was altered or is gone: restore the bank from a copy")
    return Bank(str(address), _header(row.header), WeightStore(_resolved(url, row.store)), schema.connect(url))


@retried
def _check_free(engine: Engine) -> None:
    with schema.reading(engine) as connection:
        _check_no_bank(connection)


def _check_no_bank(connection: Connection) -> None:
    """Refuse a database with a bank, with tables of a bank's names, or a file with any table at all."""
    name, tables = schema.shown(connection.engine.url), set(inspect(connection).get_table_names())
    if {"bank", "alembic_version"} <= tables:
        raise BankError(f"{name} already holds a bank: open it, or choose another address")
    taken = tables if connection.dialect.name == "sqlite" else tables & {*schema.metadata.tables, "alembic_version"}
    if taken:
        raise BankError(f"{name} has a table '{min(taken)}' of something else: choose another address for the bank")


def _create_tables(engine: Engine, header: Header, place: str) -> None:
    if engine.url.get_backend_name() == "sqlite" and engine.url.database:
        try:
            with closing(sqlite3.connect(engine.url.database, schema.BUSY_SECONDS)) as file:
                file.execute(f"PRAGMA page_size={PAGE}")
                file.execute("PRAGMA journal_mode=WAL")  # the file remembers it; readers then never wait
        except sqlite3.Error as error:
            raise BankError(f"{engine.url.database} cannot be made ({error}): check access and free space") from error
    text = _header_text(header)
    values = {"id": 1, "header": text, "store": place, "created": now(), "seal": seal("bank", "header", text, place)}
    sent = False

    def make() -> None:
        nonlocal sent
        with schema.writing(engine) as connection:
            if sent and inspect(connection).has_table("bank"):  # an earlier try came to its end: this may be its bank
                made = connection.execute(select(schema.bank.c.seal).where(schema.bank.c.id == 1)).scalar()
                if made == values["seal"]:
                    return
            _check_no_bank(connection)
            upgrade(connection)
            connection.execute(insert(schema.bank).values(values))
            sent = True

    retry(make)


def _header_text(header: Header) -> str:
    content = {
        "spec": header.spec.to_json(),
        "preprocessing": header.preprocessing.to_json(),
        **{name: getattr(header, name) for name in _PLAIN},
    }
    return json.dumps(content, sort_keys=True, allow_nan=False)


_PLAIN = ("backbone", "space", "stream", "groups", "features", "backbone_weights")


def _header(text: str) -> Header:
    content = json.loads(text)
    return Header(
        spec=BackboneSpec.from_json(content["spec"]),
        preprocessing=resolve_preprocessing({}, Hints(), **content["preprocessing"]),
        **{name: content[name] for name in _PLAIN if name != "groups"},
        groups=tuple((name, size) for name, size in content["groups"]),
    )


def _store_of(url: URL, store: str | None) -> str:
    """The place of the weights as the bank remembers it: beside a SQLite file by name alone, so that both can move."""
    if store is not None:
        return store if "://" in store else str(Path(store).expanduser().resolve())
    if url.get_backend_name() != "sqlite" or not url.database:
        raise BankError(
            f"a bank at {schema.shown(url)} needs a place for its weights that all its users reach: give --store, "
            "a path or an address such as s3://bucket/folder"
        )
    return f"./{Path(url.database).name}.weights"


def _resolved(url: URL, place: str) -> str:
    """Where the weights are: beside a SQLite file under the name they were made with, or, if that is gone, its own."""
    if not place.startswith("./"):
        return place
    file = Path(url.database or ".").resolve()
    made, renamed = (file.with_name(name) for name in (place[2:], f"{file.name}.weights"))
    return str(renamed if renamed.is_dir() and not made.is_dir() else made)


def _check_folder(path: Path) -> None:
    if not path.resolve().parent.is_dir():
        raise BankError(f"{path} cannot be made: there is no folder {path.resolve().parent}")


def _stored_backbone(backbone: Backbone) -> dict[str, Tensor]:
    state = backbone.model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{backbone.head}.")}
