"""Migrations of a bank's tables, run by Alembic."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, inspect

from kinprune.bank import schema
from kinprune.bank.retrying import retry
from kinprune.errors import BankError


def upgrade(connection: Connection) -> None:
    """Bring a database to the newest schema, within the transaction of ``connection``; an empty one gets all tables."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, schema.VERSION)


def upgrade_bank(address: str | Path) -> tuple[str, str]:
    """Upgrade an older bank in place and return its schema before and after. BankError where there is no bank."""
    url = schema.parse_address(address)
    if url.database and url.get_backend_name() == "sqlite" and not Path(url.database).is_file():
        raise BankError(f"there is no bank at {url.database}: correct the path")
    name = schema.shown(url)
    before: str | None = None

    def bring_up() -> str:
        nonlocal before
        with schema.writing(engine) as connection:
            if not inspect(connection).has_table("alembic_version"):
                raise BankError(f"{name} is a database, but no bank: make one with 'kinprune bank build'")
            found = schema.read_version(connection)
            if found > schema.VERSION:
                raise BankError(f"{name} has the schema {found}, newer than {schema.VERSION} here: upgrade Kinprune")
            upgrade(connection)
            before = before or found  # run again, it may find its own work
        return before

    with schema.connected(url) as engine:
        return retry(bring_up), schema.VERSION
