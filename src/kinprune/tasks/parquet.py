"""Parquet files of encoded images, as Hugging Face data sets store them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.errors import TaskError
from kinprune.tasks.classes import listed
from kinprune.tasks.columns import Columns, find_columns, is_label_type
from kinprune.tasks.packages import require
from kinprune.tasks.splitting import group_rows
from kinprune.tasks.task import Payload, Pool

BATCH = 256  # rows read at once: some 30 MB of ordinary photographs
_SPLIT_WORDS = {
    "train": "train|training",
    "test": "test|testing|eval|evaluation",
    "val": "val|valid|validation|dev",
}


@dataclass(frozen=True)
class Part:
    """One parquet file: its path, its path within the source, its rows and its size in bytes."""

    path: Path
    name: str
    rows: int
    size: int


@dataclass(frozen=True, eq=False)
class ParquetReader:
    """Encoded images in a column of parquet files; rows run on from file to file."""

    parts: tuple[Part, ...]
    leaf: str

    def key(self, row: int) -> str:
        """Return the row as text."""
        return str(row)

    def identity(self, row: int) -> str:
        """Return the file's name and size and the row in it."""
        part, local = self._locate(row)
        return f"{part.name}:{part.size}:{local}"

    def where(self, row: int) -> str:
        """Return the row in its file and the whole path."""
        part, local = self._locate(row)
        return f"row {local} of {part.path}"

    def _locate(self, row: int) -> tuple[Part, int]:
        for part in self.parts:
            if row < part.rows:
                return part, row
            row -= part.rows
        raise IndexError(row)

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        """Yield the encoded images in the order of the files, a batch of rows in memory at a time."""
        wanted = np.asarray(rows, dtype=np.int64)
        order = np.argsort(wanted, kind="stable")
        first = 0
        for part in self.parts:
            here = order[(wanted[order] >= first) & (wanted[order] < first + part.rows)]
            if len(here):
                with reading(part.path):
                    yield from self._read_part(part, wanted[here] - first, here)
            first += part.rows

    def _read_part(
        self, part: Part, rows: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> Iterator[tuple[int, bytes]]:
        """Rows ascending, of one file, and their positions in the answer."""
        file = open_parquet(part.path)
        if file.metadata.num_rows != part.rows:
            raise TaskError(
                f"{part.path} has changed since the task was loaded: {file.metadata.num_rows} rows, "
                f"not {part.rows}; load the task again"
            )
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if np.searchsorted(rows, first) < np.searchsorted(rows, end):
                for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], columns=[self.leaf]):
                    low, high = np.searchsorted(rows, [first, first + batch.num_rows])
                    if low < high:
                        yield from self._encoded(part, batch, rows[low:high], first, positions[low:high])
                    first += batch.num_rows
            first = end

    def _encoded(
        self, part: Part, batch: Any, rows: NDArray[np.int64], first: int, positions: NDArray[np.int64]
    ) -> Iterator[tuple[int, bytes]]:
        arrow = require("pyarrow", "reading parquet")
        column = batch.column(0)
        if arrow.types.is_struct(column.type):
            column = require("pyarrow.compute", "reading parquet").struct_field(column, [0])
        encoded = column.take(arrow.array(rows - first)).to_pylist()
        for row, position, image in zip(rows, positions, encoded, strict=True):
            if image is None:
                raise TaskError(f"row {row} of {part.path} holds no image in {self.leaf!r}; remove the row or embed it")
            yield int(position), image


def open_parquet(path: Path) -> Any:
    """Open a parquet file without reading its columns; raises TaskError where it is damaged or no parquet."""
    with reading(path):
        return require("pyarrow.parquet", "reading parquet").ParquetFile(path, memory_map=True)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into a TaskError."""
    arrow = require("pyarrow", "reading parquet")
    try:
        yield
    except (OSError, arrow.ArrowException) as error:
        raise TaskError(f"{path} cannot be read as parquet ({error}); expected a whole, unaltered file") from error


def split_files(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sort parquet files' relative paths into (train or all, test) by the word in them.

    ``val`` and the like are the test part where nothing says ``test``; with no word anywhere all is one part.
    Raises TaskError for test files without training files.
    """
    parts: dict[str, list[str]] = {"train": [], "test": [], "val": []}
    for name in sorted(names):
        word = _split_word(name)
        if word is not None:
            parts[word].append(name)
    tested = parts["test"] or parts["val"]
    if parts["train"]:
        return parts["train"], tested
    if tested:
        raise TaskError(
            f"{listed(tested)} are test files, but no file is named train...; add it or give one file alone"
        )
    return sorted(names), []


def _split_word(name: str) -> str | None:
    stem = name.removesuffix(".parquet").lower()
    for word, words in _SPLIT_WORDS.items():
        if re.search(rf"(^|[^a-z])({words})($|[^a-z])", stem):
            return word
    return next((word for word in ("train", "test") if stem.rsplit("/", 1)[-1].startswith(word)), None)


def read_parquet(
    root: Path, names: Sequence[str], *, image: str | None = None, label: str | None = None
) -> tuple[tuple[str, ...], Pool, Pool | None]:
    """Return (classes, training part or all, test part or None) of parquet files, given relative to ``root``.

    Only footers and the label column are read. Raises TaskError for columns missing, ambiguous or of a wrong
    type and for labels missing or out of range.
    """
    train_names, test_names = ([*names], []) if len(names) == 1 else split_files(names)
    first = train_names[0]
    files = {name: open_parquet(root / name) for name in (*train_names, *test_names)}
    columns = find_columns(files[first].schema_arrow, first, image, label)
    for name, file in files.items():
        found = find_columns(file.schema_arrow, name, columns.image, columns.label)
        if found != columns:
            raise TaskError(
                f"{name} and {first} differ in their columns or class names; expected the same in all files"
            )
    labels = {name: _labels(root / name, files[name], columns) for name in files}
    if len({array.dtype.kind for array in labels.values()}) > 1:
        raise TaskError(f"{first}: {columns.label!r} holds numbers in some files and text in others; use one of them")
    classes, indices = _index(labels, columns.names)
    parts = {name: Part(root / name, name, len(labels[name]), (root / name).stat().st_size) for name in files}

    def pool(names: Sequence[str]) -> Pool:
        reader = ParquetReader(tuple(parts[name] for name in names), columns.leaf)
        return Pool(reader, group_rows(np.concatenate([indices[name] for name in names]), classes, reader))

    return classes, pool(train_names), pool(test_names) if test_names else None


def _labels(path: Path, file: Any, columns: Columns) -> NDArray[Any]:
    """A file's label column, int64 or str [rows]; class indices where the names are declared."""
    types = require("pyarrow", "reading parquet").types
    with reading(path):
        column = file.read(columns=[columns.label]).column(0).combine_chunks()
    if not is_label_type(column.type):
        raise TaskError(f"{path}: label column {columns.label!r} is of type {column.type}; expected numbers or text")
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise TaskError(f"row {row} of {path} has no label in {columns.label!r}; label it or remove it")
    whole = types.is_integer(column.type)
    if columns.names is not None and not whole:
        raise TaskError(f"{path}: {columns.label!r} declares class names but is {column.type}; expected their indices")
    return np.asarray(column.to_pylist(), dtype=np.int64 if whole else np.str_)


def _index(
    labels: dict[str, NDArray[Any]], names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], dict[str, NDArray[Any]]]:
    """Class names and each file's class indices; undeclared names are the labels themselves, sorted."""
    if names is not None:
        return names, labels
    values = np.unique(np.concatenate(list(labels.values())))
    indices = {name: np.searchsorted(values, array) for name, array in labels.items()}
    return tuple(str(value) for value in values), indices
