"""Writing so that whatever happens there is the old or the new, and nothing half-written."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def directory_beside(target: Path, purpose: str) -> Iterator[Path]:
    """A new hidden directory ``.<target>.<random>.<purpose>`` on the target's file system, gone afterwards."""
    path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{purpose}")
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # moved into place, there is none


def settle(directory: Path) -> None:
    """Have the files of a directory, and the directory, on the disk itself."""
    for path in directory.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    settle_names(directory)


def settle_names(directory: Path) -> None:
    """Have the names in a directory on the disk itself, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_directory(new: Path, target: Path) -> None:
    """Move the complete directory ``new`` to ``target``, in the place of a directory that may be there.

    Directories cannot be exchanged in one step everywhere: an old one with files is moved aside, as
    ``.<target>.<random>.old``, and back should the second step fail.
    """
    if not target.exists() or not any(target.iterdir()):
        if os.name == "nt" and target.exists():
            target.rmdir()
        new.rename(target)
        settle_names(target.parent)
        return
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    target.rename(aside)
    try:
        new.rename(target)
        settle_names(target.parent)
    except BaseException:
        if not target.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def moved_aside(target: Path) -> list[Path]:
    """What ``replace_directory`` moved aside and could not move back, the process having been killed."""
    return sorted(target.parent.glob(f".{target.name}.*.old")) if target.parent.is_dir() else []
