"""What a task is: labelled images with their classes and split, first as references, then decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from numpy.typing import NDArray
from PIL import Image

from kinprune.preprocessing import Preprocessing

if TYPE_CHECKING:  # pixels are read without PyTorch too
    from torch import Tensor

Payload: TypeAlias = Path | bytes | Image.Image | NDArray[Any]
"""An image not yet decoded: a file, an encoded file's bytes, a picture, or uint8 pixels ``[h, w(, c)]``."""

SEPARATOR = "\x1f"  # joins the parts of what is hashed: in no file or class name that a person types


class Reader(Protocol):
    """Where a source's images are read from; a row is an image's number in it, from 0."""

    def key(self, row: int) -> str:
        """Name the image within its class, wherever the source lies and however it is listed: splits hang on it."""
        ...

    def identity(self, row: int) -> str:
        """Name the image as ``key`` does, and what is cheaply known of its content (size, hash of pixels)."""
        ...

    def where(self, row: int) -> str:
        """Say to a person which image this is."""
        ...

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        """Yield (position in ``rows``, image) of each of ``rows``, in whatever order is quickest to read.

        Raises TaskError where the source has changed or the image is not there.
        """
        ...


@dataclass(frozen=True, eq=False)
class Pool:
    """All the labelled images of a source, or of its train or test part: class name to rows."""

    reader: Reader
    rows: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Labelled:
    """A source that was opened: its name, its classes in order, and its images; ``test`` None where it is not split.

    Any number of tasks are taken of it (``splitting.take_task``), and it is read for none of them again.
    """

    name: str
    classes: tuple[str, ...]
    train: Pool
    test: Pool | None


@dataclass(frozen=True, eq=False)
class Items:
    """References to labelled images: ``rows`` int64 [n] of ``reader`` and ``labels`` int64 [n], class by class."""

    reader: Reader = field(repr=False)
    rows: NDArray[Any] = field(repr=False)
    labels: NDArray[Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Task:
    """A labelled image data set, not yet decoded.

    ``labels`` of both parts are indices into ``classes``; each class has at least one image in each part.
    """

    name: str
    classes: tuple[str, ...]
    train: Items
    test: Items

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the sorted class names and of every image's part, class and identity.

        The same for the same data in another place or another class order; files are told apart by relative
        path and size, parquet rows by file and number, arrays by their pixels. Computed when first asked.
        """
        digest = hashlib.sha256(repr(sorted(self.classes)).encode("utf-8", "surrogateescape"))
        for part, items in (("train", self.train), ("test", self.test)):
            lines = (
                SEPARATOR.join((part, self.classes[label], items.reader.identity(int(row))))
                for row, label in zip(items.rows, items.labels, strict=True)
            )
            for line in sorted(lines):
                digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Split:
    """Decoded images, ready for steps: ``images`` uint8 [n, 3, h, w] and ``labels`` int64 [n], on the CPU."""

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DecodedTask:
    """A task whose images are in memory, sized as ``preprocessing`` says; ``digest`` is the task's."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    preprocessing: Preprocessing
    digest: str
