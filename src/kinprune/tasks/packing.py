"""A source's images as a few arrays: other machines take tasks of it without having its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinprune.errors import TaskError
from kinprune.tasks.pixels import encoded
from kinprune.tasks.task import Items, Labelled, Payload, Pool, Reader, Task


@dataclass(frozen=True, eq=False)
class PackedReader:
    """Encoded images one behind the other: ``content`` uint8, image ``i`` from ``ends[i]`` to ``ends[i + 1]``.

    Of images that no task takes only the names are there. These are bytes of a fixed width, as NumPy keeps them.
    """

    content: NDArray[np.uint8]
    ends: NDArray[np.int64]
    keys: NDArray[np.bytes_]
    identities: NDArray[np.bytes_]
    places: NDArray[np.bytes_]

    def key(self, row: int) -> str:
        """Return the key in the source."""
        return _text(self.keys[row])

    def identity(self, row: int) -> str:
        """Return the identity in the source."""
        return _text(self.identities[row])

    def where(self, row: int) -> str:
        """Return where the image was in the source."""
        return _text(self.places[row])

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        """Yield the encoded images, in order."""
        for position, row in enumerate(rows):
            first, end = int(self.ends[row]), int(self.ends[row + 1])
            if first == end:
                raise TaskError(f"{self.where(row)} was not packed: no task was to take it")
            yield position, self.content[first:end].tobytes()


def pack_source(source: Labelled, tasks: Sequence[Task]) -> Labelled:
    """A source of which the same tasks can be taken with the same digests, all of it in arrays.

    It holds the classes that ``tasks``, taken of ``source``, have, and of their images those that a task takes.

    Raises:
        TaskError: an image cannot be read.
    """
    wanted = {name for task in tasks for name in task.classes}
    shared = source.test is None
    train = _pack_pool(source.train, wanted, [part for task in tasks for part in _parts(task, shared)])
    test = None if source.test is None else _pack_pool(source.test, wanted, [task.test for task in tasks])
    classes = tuple(name for name in source.classes if name in wanted)
    return Labelled(source.name, classes, train, test)


def _parts(task: Task, shared: bool) -> tuple[Items, ...]:
    return (task.train, task.test) if shared else (task.train,)


def _pack_pool(pool: Pool, wanted: set[str], taken: Iterable[Items]) -> Pool:
    classes = [name for name in pool.rows if name in wanted]
    rows = np.concatenate([pool.rows[name] for name in classes]) if classes else np.empty(0, np.int64)
    ends = np.cumsum([0, *(len(pool.rows[name]) for name in classes)])
    read = np.flatnonzero(np.isin(rows, np.concatenate([items.rows for items in taken])))
    return Pool(
        _pack(pool.reader, rows, read),
        {name: np.arange(ends[place], ends[place + 1]) for place, name in enumerate(classes)},
    )


def _pack(reader: Reader, rows: NDArray[np.int64], read: NDArray[np.int64]) -> PackedReader:
    """The images ``rows[read]`` of a reader, and the names of all its ``rows``."""
    files: list[bytes] = [b""] * len(rows)
    for position, payload in reader.read(rows[read].tolist()):
        place = int(read[position])
        files[place] = encoded(payload, reader.where(int(rows[place])))
    numbers = [int(row) for row in rows]
    return PackedReader(
        np.frombuffer(b"".join(files), dtype=np.uint8),
        np.cumsum([0, *map(len, files)], dtype=np.int64),
        *(_names([name(row) for row in numbers]) for name in (reader.key, reader.identity, reader.where)),
    )


def _names(texts: Sequence[str]) -> NDArray[np.bytes_]:
    return np.array([text.encode("utf-8", "surrogateescape") for text in texts], dtype=np.bytes_)


def _text(name: np.bytes_) -> str:
    return bytes(name).decode("utf-8", "surrogateescape")
