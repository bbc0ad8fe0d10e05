"""From a source's images to a task: classes chosen, a seeded stratified split, shots."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinprune.errors import TaskError
from kinprune.tasks.classes import check_unique, choose_classes, listed
from kinprune.tasks.task import SEPARATOR, Items, Labelled, Pool, Reader, Task

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """What to take of a source; refused when made, before anything is read."""

    classes: Sequence[str] | str | None = None
    shots: int | None = None
    test_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shots is not None and (not _is_whole(self.shots) or self.shots < 1):
            raise TaskError(f"shots={self.shots!r}: expected a whole number of training images per class, at least 1")
        fraction = self.test_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise TaskError(f"test_fraction={fraction!r}: expected a number between 0 and 1, such as 0.2")
        if not _is_whole(self.seed):
            raise TaskError(f"seed={self.seed!r}: expected a whole number")


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def split_class(reader: Reader, name: str, rows: Rows, choice: Choice) -> tuple[Rows, Rows]:
    """Split one class's rows into (train, test): a seeded shuffle, its last ``test_fraction`` the test part.

    At least one image goes to each part. The result depends on nothing but the seed, the class's name and its
    images' keys. Raises TaskError for fewer than two images.
    """
    if len(rows) < 2:
        raise TaskError(
            f"class {name!r} has one image ({reader.where(int(rows[0]))}), which cannot be both trained and tested on; "
            "add images, leave the class out, or give separate train and test parts"
        )
    ordered = order(reader, name, rows, choice.seed)
    n_test = min(max(math.floor(choice.test_fraction * len(rows) + 0.5), 1), len(rows) - 1)
    return ordered[:-n_test], ordered[-n_test:]


def order(reader: Reader, name: str, rows: Rows, seed: int) -> Rows:
    """Shuffle one class's rows, sorting them by a hash of (seed, class, key).

    Hashes rather than a generator's permutation: an image added moves no other image past its neighbours, and
    neither the order of listing nor other classes matter.
    """

    def place(row: int) -> tuple[bytes, int]:
        text = SEPARATOR.join((str(seed), name, reader.key(row)))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest(), row

    return np.array(sorted((int(row) for row in rows), key=place), dtype=np.int64)


def group_rows(labels: Rows, names: Sequence[str], reader: Reader) -> dict[str, Rows]:
    """Return the rows of each class, ascending, from each row's index into ``names``.

    Raises TaskError for an index out of range or a name given twice.
    """
    check_unique(names, "class names")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        raise TaskError(
            f"{reader.where(int(wrong[0]))} has the label {labels[wrong[0]]}; expected 0 to {len(names) - 1}, the "
            "indices of the class names (-1 usually means unlabelled: give the labelled part alone)"
        )
    ordered = np.argsort(labels, kind="stable").astype(np.int64)
    ends = np.searchsorted(labels[ordered], np.arange(len(names) + 1))
    return {name: ordered[ends[index] : ends[index + 1]] for index, name in enumerate(names)}


def take_task(source: Labelled, choice: Choice) -> Task:
    """Take a task of a source's images.

    Raises TaskError where ``choice`` does not fit the source or a class lacks images.
    """
    name, known, train, test = source.name, source.classes, source.train, source.test
    extra = [other for other in test.rows if other not in known] if test is not None else []
    if extra and choice.classes is None:
        raise TaskError(f"{name}: class {listed(extra)} is in the test part but not in the training part; fix the data")
    classes = choose_classes([*known, *extra], choice.classes, name)
    parts: list[tuple[Rows, Rows]] = []
    for one in classes:
        _check_images(name, one, train, test)
        if test is None:
            trained, tested = split_class(train.reader, one, train.rows[one], choice)
        else:
            trained = order(train.reader, one, train.rows[one], choice.seed)
            tested = order(test.reader, one, test.rows[one], choice.seed)
        parts.append((trained[: choice.shots], tested))
    return Task(
        name=name,
        classes=classes,
        train=_items(train.reader, [trained for trained, _ in parts]),
        test=_items((test or train).reader, [tested for _, tested in parts]),
    )


def _check_images(name: str, one: str, train: Pool, test: Pool | None) -> None:
    has_train = len(train.rows.get(one, ())) > 0
    has_test = test is None or len(test.rows.get(one, ())) > 0
    if has_train and has_test:
        return
    if not has_train and test is None:
        lack = "is empty: it has no image"
    elif not has_train:
        lack = "has no image in the training part"
    else:
        lack = "has no image in the test part"
    raise TaskError(f"{name}: class {one!r} {lack}; add images or choose classes without it")


def _items(reader: Reader, rows_of: Sequence[Rows]) -> Items:
    labels = np.repeat(np.arange(len(rows_of), dtype=np.int64), [len(rows) for rows in rows_of])
    return Items(reader=reader, rows=np.concatenate(rows_of), labels=labels)
