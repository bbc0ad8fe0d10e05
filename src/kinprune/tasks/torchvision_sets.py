"""torchvision data sets: objects already made, or named as ``torchvision:CIFAR10?root=DIR``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kinprune.errors import TaskError
from kinprune.tasks.classes import suggest
from kinprune.tasks.packages import require
from kinprune.tasks.splitting import Choice, group_rows, take_task
from kinprune.tasks.task import Labelled, Payload, Pool, Task

SCHEME = "torchvision:"
TRAIN_SPLITS = ("train", "trainval", "train-standard")
TEST_SPLITS = ("test", "val", "valid")
LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")  # where torchvision's data sets keep them


@dataclass(frozen=True, eq=False)
class DatasetReader:
    """Images of a map-style data set; a row is an index into it."""

    dataset: Any
    labels: NDArray[np.int64]
    name: str

    def key(self, row: int) -> str:
        """Return the row as text."""
        return str(row)

    def identity(self, row: int) -> str:
        """Return the data set's type and length and the row."""
        return f"{type(self.dataset).__name__}:{len(self.labels)}:{row}"

    def where(self, row: int) -> str:
        """Return which item of which data set."""
        return f"item {row} of {self.name}"

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        """Yield the items, in order, checking that each has the label it was listed with."""
        for position, row in enumerate(rows):
            try:
                image, label = self.dataset[int(row)]
            except (OSError, SyntaxError) as error:
                raise TaskError(f"{self.where(row)} cannot be read ({error}); replace its file") from error
            if int(label) != self.labels[row]:
                raise TaskError(f"{self.where(row)} is labelled {label}, its list of labels says {self.labels[row]}")
            yield position, _picture(image, self.where(row))


def _picture(image: object, where: str) -> Payload:
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, torch.Tensor) or image.ndim not in (2, 3):
        raise TaskError(f"{where} is a {type(image).__name__}; expected a PIL image or a tensor [channels, h, w]")
    pixels = image if image.ndim == 3 else image[None]
    if pixels.is_floating_point():
        if float(pixels.min()) < 0 or float(pixels.max()) > 1:
            raise TaskError(f"{where} has pixels outside [0, 1]; make the data set without a normalising transform")
        pixels = (pixels * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8 or pixels.shape[0] not in (1, 3, 4):
        raise TaskError(f"{where} is {pixels.dtype} {list(pixels.shape)}; expected uint8 or [0, 1], 1, 3 or 4 channels")
    array: NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
    return array


def load_torchvision(
    train: Any,
    test: Any = None,
    *,
    classes: Sequence[str] | str | None = None,
    shots: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    name: str | None = None,
    class_names: Sequence[str] | None = None,
) -> Task:
    """Make a task of one map-style data set (split here) or of two, giving (PIL image or tensor, int).

    ``class_names`` default to the data set's ``classes`` or ``categories``, else to its labels as text; the rest
    is as in ``load_task``. Labels are taken from ``targets`` and the like, without decoding, where there are any.
    """
    choice = Choice(classes, shots, test_fraction, seed)
    return take_task(read_torchvision(train, test, name=name, class_names=class_names), choice)


def read_torchvision(
    train: Any, test: Any = None, *, name: str | None = None, class_names: Sequence[str] | None = None
) -> Labelled:
    """One map-style data set, or its two parts, opened; see ``load_torchvision``."""
    name = name or type(train).__name__.lower()
    readers = [_reader(train, f"{name} train"), *([] if test is None else [_reader(test, f"{name} test")])]
    names = tuple(class_names) if class_names is not None else _class_names(train)
    if names is None:
        values = np.unique(np.concatenate([reader.labels for reader in readers]))
        names = tuple(str(value) for value in range(int(values.min(initial=0)), int(values.max(initial=-1)) + 1))
    pools = [Pool(reader, group_rows(reader.labels, names, reader)) for reader in readers]
    return Labelled(name, names, pools[0], pools[1] if test is not None else None)


def _reader(dataset: Any, name: str) -> DatasetReader:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TaskError(f"{name} is a {type(dataset).__name__}; expected a map-style data set, with len() and [index]")
    return DatasetReader(dataset, _labels(dataset, name), name)


def _labels(dataset: Any, name: str) -> NDArray[np.int64]:
    found = next((getattr(dataset, key) for key in LABEL_ATTRIBUTES if hasattr(dataset, key)), None)
    if found is None:
        pairs = getattr(dataset, "samples", getattr(dataset, "_samples", None))
        found = [pair[1] for pair in pairs] if pairs is not None else [dataset[row][1] for row in range(len(dataset))]
    elif getattr(dataset, "target_transform", None) is not None:
        found = [dataset.target_transform(label) for label in found]
    labels = np.asarray(found)
    if labels.shape != (len(dataset),) or not np.issubdtype(labels.dtype, np.integer):
        raise TaskError(
            f"{name} has labels {labels.dtype} {list(labels.shape)}; expected one whole number an image, "
            f"[{len(dataset)}]"
        )
    return labels.astype(np.int64)


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    found = getattr(dataset, "classes", getattr(dataset, "categories", None))
    if found is None:
        return None
    # ImageNet's classes are tuples of synonyms, of which the first alone is not unique.
    return tuple(", ".join(one) if isinstance(one, tuple | list) else str(one) for one in found)


def make_datasets(address: str) -> tuple[str, Any, Any]:
    """Make the data set that ``torchvision:NAME?root=DIR[&download=1][&key=value]`` names.

    Returns (name, train or all, test or None). Nothing is downloaded without ``download=1``; other keys go to the
    data set's constructor. Raises TaskError where it is unknown or not in ``root``.
    """
    name, _, query = address.removeprefix(SCHEME).partition("?")
    sets = require("torchvision.datasets", address)
    if name not in sets.__all__:
        raise TaskError(f"{address!r}: torchvision has no data set {name!r}; {suggest(name, sorted(sets.__all__))}")
    options: dict[str, Any] = dict(parse_qsl(query))
    if "root" not in options:
        raise TaskError(f"{address!r}: say where its files are, as {SCHEME}{name}?root=DIR")
    kind = getattr(sets, name)
    known = _parameters(kind)
    for key in options:
        if key not in known:
            raise TaskError(f"{address!r}: {name} has no option {key!r}; {suggest(key, sorted(known))}")
    if "download" in options:
        options["download"] = options["download"].lower() in ("1", "true", "yes")
    if "train" in known:
        return name, _make(kind, options | {"train": True}, address), _make(kind, options | {"train": False}, address)
    if "split" in known and "split" not in options:
        return name, _first(kind, options, TRAIN_SPLITS, address), _first(kind, options, TEST_SPLITS, address)
    return name, _make(kind, options, address), None


def _first(kind: Any, options: dict[str, Any], splits: Sequence[str], address: str) -> Any:
    """The data set with the first of ``splits`` that it knows: they do not agree on a name."""
    refused: ValueError | None = None
    for split in splits:
        try:
            return _make(kind, options | {"split": split}, address)
        except ValueError as error:
            refused = error
    raise TaskError(f"{address!r}: {refused}; choose one with &split=...") from refused


def _make(kind: Any, options: dict[str, Any], address: str) -> Any:
    try:
        return kind(**options)
    except (RuntimeError, OSError, TypeError) as error:
        raise TaskError(
            f"{address!r} cannot be made ({error}); check root={options['root']!r} and the options, "
            "or add &download=1 to have it downloaded there"
        ) from error


def _parameters(kind: type) -> set[str]:
    """The constructor's options, with those that it hands on to its parents."""
    return {
        parameter.name
        for parent in kind.__mro__
        if parent is not object and "__init__" in vars(parent)
        for parameter in inspect.signature(vars(parent)["__init__"]).parameters.values()
        if parameter.name != "self" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
