"""Tasks of images that are in memory already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kinprune.errors import TaskError
from kinprune.tasks.splitting import Choice, group_rows, take_task
from kinprune.tasks.task import Labelled, Payload, Pool, Task

Layout = Literal["NHWC", "NCHW"]
CHANNELS = (1, 3, 4)


@dataclass(frozen=True, eq=False)
class ArrayReader:
    """Pixels uint8 [n, h, w] or [n, h, w, c]; a row is an index into them. They are viewed, not copied."""

    images: NDArray[np.uint8]
    name: str

    def key(self, row: int) -> str:
        """Return the row as text."""
        return str(row)

    def identity(self, row: int) -> str:
        """Return the pixels' shape and SHA-256."""
        pixels = self.images[row]
        return f"{pixels.shape}:{hashlib.sha256(pixels.tobytes()).hexdigest()}"

    def where(self, row: int) -> str:
        """Return which image of which task."""
        return f"image {row} of {self.name}"

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Payload]]:
        """Yield views of the pixels, in order."""
        for position, row in enumerate(rows):
            yield position, self.images[row]


def task_from_arrays(
    images: Any,
    labels: Any,
    classes: Sequence[str] | None = None,
    *,
    test_images: Any = None,
    test_labels: Any = None,
    choose: Sequence[str] | str | None = None,
    shots: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    name: str = "arrays",
    layout: Layout | None = None,
) -> Task:
    """Make a task of pixels in memory.

    ``images`` are uint8, numpy or torch: [n, h, w, c], [n, c, h, w] or grey [n, h, w], with 1, 3 or 4 channels;
    ``layout`` is needed only where the shape fits both. ``labels`` [n] are indices into ``classes``, the names of
    all labels (default: the labels themselves). ``choose`` picks some classes, in that order; ``test_images`` and
    ``test_labels`` are a test part of one's own. Pixels are not copied before ``decode``: do not change them.
    Raises TaskError for a wrong shape, dtype or label.
    """
    choice = Choice(choose, shots, test_fraction, seed)
    if (test_images is None) != (test_labels is None):
        raise TaskError("test_images and test_labels: one is missing; give both or neither")
    pixels = _pixels(images, layout, "images")
    indices = _indices(labels, len(pixels), "labels")
    names = tuple(classes) if classes is not None else tuple(str(label) for label in range(indices.max(initial=-1) + 1))
    train = _pool(pixels, indices, names, name, classes is None)
    if test_images is None:
        return take_task(Labelled(name, tuple(train.rows), train, None), choice)
    tested = _pixels(test_images, layout, "test_images")
    test = _pool(tested, _indices(test_labels, len(tested), "test_labels"), names, f"{name} test", classes is None)
    return take_task(Labelled(name, tuple(train.rows), train, test), choice)


def _pixels(images: Any, layout: Layout | None, role: str) -> NDArray[np.uint8]:
    """The images as [n, h, w] or [n, h, w, c], a view of what was given where that is possible."""
    array = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.dtype != np.uint8:
        raise TaskError(f"{role} are {array.dtype}; expected uint8 pixels from 0 to 255: scale and convert them first")
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise TaskError(f"{role} have the shape {array.shape}; expected [n, h, w], [n, h, w, c] or [n, c, h, w]")
    if array.ndim == 3:
        return array
    last, second = array.shape[3] in CHANNELS, array.shape[1] in CHANNELS
    if layout not in (None, "NHWC", "NCHW"):
        raise TaskError(f"layout={layout!r}; expected 'NHWC' or 'NCHW'")
    if layout is None and last and second:
        raise TaskError(f"{role} of shape {array.shape} may be NHWC or NCHW; say which with layout='NHWC' or 'NCHW'")
    found = layout or ("NHWC" if last else "NCHW")
    if not (last if found == "NHWC" else second):
        raise TaskError(
            f"{role} have the shape {array.shape}; expected 1, 3 or 4 channels, last (NHWC) or second (NCHW)"
        )
    return array if found == "NHWC" else array.transpose(0, 2, 3, 1)


def _indices(labels: Any, images: int, role: str) -> NDArray[np.int64]:
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if array.shape != (images,) or not np.issubdtype(array.dtype, np.integer):
        raise TaskError(
            f"{role} are {array.dtype} {list(array.shape)}; expected whole numbers, one an image: [{images}]"
        )
    return array.astype(np.int64)


def _pool(pixels: NDArray[np.uint8], labels: NDArray[np.int64], names: Sequence[str], name: str, implied: bool) -> Pool:
    reader = ArrayReader(pixels, name)
    rows = group_rows(labels, names, reader)
    # Names made up from the labels need not be without gaps.
    return Pool(reader, {name: found for name, found in rows.items() if len(found)} if implied else rows)
