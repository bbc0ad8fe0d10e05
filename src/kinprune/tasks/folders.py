"""Image folders: a sub-folder per class, or train/ and test/ folders of those."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kinprune.errors import TaskError
from kinprune.tasks.classes import check_unique, listed
from kinprune.tasks.splitting import Rows
from kinprune.tasks.task import Payload, Pool

_SUFFIXES = "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm pnm avif"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split(" "))
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")  # the first one there is the test part
NOT_CLASSES = frozenset({"__MACOSX", "@eaDir"})  # what archivers and file servers leave beside the images


@dataclass(frozen=True)
class ImageFile:
    """An image file: its path, its path within its class's folder (NFC, with slashes), its size in bytes."""

    path: Path
    key: str
    size: int


@dataclass(frozen=True, eq=False)
class FileReader:
    """Images as files; a row is an index into ``files``."""

    files: tuple[ImageFile, ...]

    def key(self, row: int) -> str:
        """Return the path within the class's folder."""
        return self.files[row].key

    def identity(self, row: int) -> str:
        """Return the path within the class's folder and the size."""
        return f"{self.files[row].key}:{self.files[row].size}"

    def where(self, row: int) -> str:
        """Return the whole path."""
        return str(self.files[row].path)

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        """Yield the paths, in order."""
        for position, row in enumerate(rows):
            yield position, self.files[row].path


def list_images(folder: Path) -> tuple[Path, ...]:
    """Return the image files in ``folder`` and below it, sorted; hidden and other files are left out."""
    return tuple(image.path for image in _walk(folder, "", set()))


def read_folder(root: Path) -> tuple[tuple[str, ...], Pool, Pool | None] | None:
    """Return (classes, training part or all, test part or None) of an image folder; None if it holds no image.

    ``train/`` is a part, not a class, if it holds folders but no image directly; so is ``test/``, or ``val/``
    where there is no ``test/``. Raises TaskError where images have no class.
    """
    folders = _folders(root)
    train = next((folders[key] for name in TRAIN_FOLDERS for key in folders if key.lower() == name), None)
    if train is not None and _holds_classes(train):
        tested = _test_folder(root, folders)
        pool = _read_classes(train)
        return _classes(pool, train), pool, _read_classes(tested) if tested is not None else None
    pool = _read_classes(root)
    if any(len(rows) for rows in pool.rows.values()):
        _refuse_lone_test(root, folders)
        return _classes(pool, root), pool, None
    if _has_image(root):
        raise TaskError(f"{root} holds images but no class folders; put each class's images in a folder of its name")
    return None


def _classes(pool: Pool, folder: Path) -> tuple[str, ...]:
    if not any(len(rows) for rows in pool.rows.values()):
        raise TaskError(
            f"{folder} holds no images: its folders {listed(list(pool.rows))} have none with a known suffix"
        )
    return tuple(pool.rows)


def _test_folder(root: Path, folders: dict[str, Path]) -> Path | None:
    found = [folders[key] for name in TEST_FOLDERS for key in folders if key.lower() == name]
    labelled = [folder for folder in found if _holds_classes(folder)]
    if labelled:
        return labelled[0]
    flat = [folder for folder in found if _has_image(folder)]
    if flat:
        raise TaskError(
            f"{flat[0]} holds images but no class folders, so nothing can be tested on it; "
            f"sort it into class folders, or give the training folder alone to have it split"
        )
    return None


def _refuse_lone_test(root: Path, folders: dict[str, Path]) -> None:
    names = [key for key in folders if key.lower() in TEST_FOLDERS and _holds_classes(folders[key])]
    if names:
        raise TaskError(f"{root} has {names[0]}/ with class folders but no train/ with class folders; add train/")


def _read_classes(folder: Path) -> Pool:
    files: list[ImageFile] = []
    rows: dict[str, Rows] = {}
    folders = _folders(folder)
    check_unique([_nfc(name) for name in folders], str(folder))
    for name, path in folders.items():
        first = len(files)
        files.extend(_walk(path, "", set()))
        rows[_nfc(name)] = np.arange(first, len(files), dtype=np.int64)
    return Pool(FileReader(tuple(files)), rows)


def _folders(folder: Path) -> dict[str, Path]:
    """The folders in ``folder`` by name, sorted; hidden ones left out."""
    found = [entry for entry in _entries(folder) if entry.is_dir() and entry.name not in NOT_CLASSES]
    return {entry.name: Path(entry.path) for entry in found}


def _holds_classes(folder: Path) -> bool:
    return bool(_folders(folder)) and not _has_image(folder)


def _has_image(folder: Path) -> bool:
    return any(_is_image(entry) for entry in _entries(folder))


def _walk(folder: Path, prefix: str, above: set[tuple[int, int]]) -> Iterator[ImageFile]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link back to a folder that holds it
        return
    for entry in _entries(folder):
        if _is_image(entry):
            yield ImageFile(Path(entry.path), prefix + _nfc(entry.name), entry.stat().st_size)
        elif entry.is_dir() and entry.name not in NOT_CLASSES:
            yield from _walk(Path(entry.path), f"{prefix}{_nfc(entry.name)}/", above | {here})


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise TaskError(f"{folder} cannot be listed ({error.strerror}); check that it may be read") from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file()


def _nfc(name: str) -> str:
    # Some file systems store decomposed accents: the same folder must be the same class everywhere.
    return unicodedata.normalize("NFC", name)
