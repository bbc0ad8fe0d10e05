"""A task's images, decoded once into memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from kinprune.errors import TaskError
from kinprune.preprocessing import Preprocessing
from kinprune.progress import track
from kinprune.tasks.memory import available_bytes
from kinprune.tasks.pixels import decode_pixels
from kinprune.tasks.task import DecodedTask, Items, Payload, Split, Task

AT_ONCE = 128  # images held encoded: enough to keep every thread busy
NAMED = 5  # damaged images named in one message


def decoded_bytes(task: Task, preprocessing: Preprocessing) -> int:
    """Return the memory in bytes that the task's decoded images take."""
    height, width = preprocessing.image_size
    return (len(task.train) + len(task.test)) * 3 * height * width


def decode(
    task: Task, preprocessing: Preprocessing, *, progress: bool = False, threads: int | None = None
) -> DecodedTask:
    """Decode all images of a task, sized for a backbone: uint8, not normalised (see ``decode_image``).

    ``threads`` defaults to the processors this process may use; the result does not depend on it. ``progress``
    shows a bar on a terminal. Raises TaskError naming the images that cannot be read, and where the images would
    not fit in memory.
    """
    if threads is not None and threads < 1:
        raise TaskError(f"threads={threads}: expected at least 1")
    _check_memory(task, preprocessing)
    with ThreadPoolExecutor(threads or _processors()) as pool:
        train = _decode(task.train, preprocessing, pool, f"decoding {task.name}: train", progress)
        test = _decode(task.test, preprocessing, pool, f"decoding {task.name}: test", progress)
    return DecodedTask(task.name, task.classes, train, test, preprocessing, task.digest)


def decode_samples(
    task: Task, classes: Collection[str], preprocessing: Preprocessing, *, each: int = 1
) -> dict[str, Tensor]:
    """Up to ``each`` training images of those of ``classes`` that a task has, by class: uint8 ``[n, 3, h, w]``.

    Raises TaskError naming the images that cannot be read.
    """
    train = task.train
    places = {
        name: np.flatnonzero(train.labels == number)[:each]
        for number, name in enumerate(task.classes)
        if name in classes
    }
    if not places:
        return {}
    chosen = np.concatenate(list(places.values()))
    items = Items(train.reader, train.rows[chosen], train.labels[chosen])
    with ThreadPoolExecutor(_processors()) as pool:
        images = _decode(items, preprocessing, pool, "", False).images
    parts = torch.split(images, [len(part) for part in places.values()])
    return dict(zip(places, parts, strict=True))


def _check_memory(task: Task, preprocessing: Preprocessing) -> None:
    needed, available = decoded_bytes(task, preprocessing), available_bytes()
    if available is not None and needed > available:
        height, width = preprocessing.image_size
        raise TaskError(
            f"{task.name}: {len(task.train) + len(task.test)} images at {height} x {width} need "
            f"{needed / 2**20:,.0f} MiB of memory and {available / 2**20:,.0f} MiB are available; take fewer images "
            "(--shots), fewer classes (--classes) or smaller images (--image-size)"
        )


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode(
    items: Items, preprocessing: Preprocessing, pool: ThreadPoolExecutor, description: str, progress: bool
) -> Split:
    images = np.empty((len(items), 3, *preprocessing.image_size), dtype=np.uint8)
    reader, rows = items.reader, items.rows.tolist()

    def put(read: tuple[int, Payload]) -> TaskError | None:
        position, payload = read
        try:
            pixels = decode_pixels(payload, preprocessing, reader.where(rows[position]))
        except TaskError as error:
            return error
        images[position] = pixels.transpose(2, 0, 1)
        return None

    def stream() -> Iterator[TaskError | None]:
        # In chunks: the pool's own map would read, and hold, all encoded images before the first is decoded.
        reads = reader.read(rows)
        while chunk := list(islice(reads, AT_ONCE)):
            yield from pool.map(put, chunk)

    failures = [failure for failure in track(stream(), description, progress, total=len(items)) if failure is not None]
    if failures:
        _refuse(failures)
    return Split(torch.from_numpy(images), torch.from_numpy(items.labels.copy()))


def _refuse(failures: list[TaskError]) -> NoReturn:
    if len(failures) == 1:
        raise failures[0]
    named = "".join(f"\n  {failure}" for failure in failures[:NAMED])
    more = f"\n  and {len(failures) - NAMED} more" if len(failures) > NAMED else ""
    raise TaskError(f"{len(failures)} images cannot be read:{named}{more}") from failures[0]
