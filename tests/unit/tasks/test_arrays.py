"""Tasks of pixels in memory: layouts, labels, names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kinprune.errors import TaskError
from kinprune.preprocessing import Preprocessing
from kinprune.tasks import decode, task_from_arrays

PLAIN = Preprocessing(image_size=(8, 6))
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 6, 3), dtype=np.uint8)
LABELS = np.arange(20) % 4


@pytest.mark.parametrize(
    "images",
    [PIXELS, PIXELS.transpose(0, 3, 1, 2), torch.from_numpy(PIXELS), torch.from_numpy(PIXELS).permute(0, 3, 1, 2)],
)
def test_layouts_give_the_same_pixels(images: Any) -> None:
    task = task_from_arrays(images, LABELS, ["a", "b", "c", "d"])
    decoded = decode(task, PLAIN)
    expected = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    assert torch.equal(decoded.train.images, expected[task.train.rows])
    assert torch.equal(decoded.test.images, expected[task.test.rows])
    assert decoded.train.labels.tolist() == LABELS[task.train.rows].tolist()
    assert decoded.train.labels.dtype == torch.int64
    assert decoded.digest == task_from_arrays(PIXELS, LABELS, ["a", "b", "c", "d"]).digest


@pytest.mark.parametrize("images", [PIXELS[..., 0], PIXELS[..., :1], PIXELS[:, None, :, :, 0]])
def test_grey(images: Any) -> None:
    task = task_from_arrays(images, torch.from_numpy(LABELS))
    decoded = decode(task, PLAIN)
    assert torch.equal(
        decoded.train.images,
        torch.from_numpy(PIXELS)[task.train.rows, :, :, :1].permute(0, 3, 1, 2).expand(-1, 3, -1, -1),
    )


def test_own_test_part_chosen_classes_and_gaps() -> None:
    task = task_from_arrays(PIXELS, LABELS, test_images=PIXELS[:8], test_labels=LABELS[:8], choose=["3", "1"], shots=2)
    assert (task.classes, len(task.train), len(task.test)) == (("3", "1"), 4, 4)
    assert task_from_arrays(PIXELS, LABELS * 3).classes == ("0", "3", "6", "9")


def test_pixels_are_not_copied() -> None:
    task = task_from_arrays(PIXELS, LABELS)
    assert np.shares_memory(task.train.reader.images, PIXELS)  # type: ignore[attr-defined]


def test_digest_follows_the_pixels() -> None:
    changed = PIXELS.copy()
    changed[0, 0, 0, 0] ^= 1
    assert task_from_arrays(changed, LABELS).digest != task_from_arrays(PIXELS, LABELS).digest


@pytest.mark.parametrize(
    ("images", "labels", "options", "match"),
    [
        (PIXELS / 255, LABELS, {}, "images are float64; expected uint8"),
        (PIXELS[0, 0], LABELS, {}, r"shape \(6, 3\)"),
        (PIXELS[:0], LABELS[:0], {}, r"shape \(0, 8, 6, 3\)"),
        (PIXELS[..., :2], LABELS, {}, "1, 3 or 4 channels"),
        (PIXELS[:, :3], LABELS, {}, "may be NHWC or NCHW"),
        (PIXELS, LABELS, {"layout": "NCHW"}, "1, 3 or 4 channels"),
        (PIXELS, LABELS, {"layout": "CHWN"}, "layout='CHWN'"),
        (PIXELS, LABELS[:5], {}, r"labels are int64 \[5\]; expected whole numbers, one an image: \[20\]"),
        (PIXELS, LABELS / 2, {}, "labels are float64"),
        (PIXELS, LABELS - 1, {}, "image 0 of arrays has the label -1"),
        (PIXELS, LABELS, {"classes": ["a", "b", "c"]}, "image 3 of arrays has the label 3; expected 0 to 2"),
        (PIXELS, LABELS, {"classes": ["a", "b", "c", "a"]}, "'a' is named more than once"),
        (PIXELS, LABELS, {"classes": ["a", "b", "c", "d", "e"]}, "class 'e' is empty"),
        (PIXELS, LABELS * 0, {}, "at least two"),
        (PIXELS, LABELS, {"test_images": PIXELS}, "give both or neither"),
        (PIXELS, LABELS, {"choose": ["0", "x"]}, "no class 'x'"),
    ],
)
def test_refused(images: Any, labels: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(TaskError, match=match):
        task_from_arrays(images, labels, **options)


def test_ambiguous_shape_with_layout() -> None:
    assert len(task_from_arrays(PIXELS[:, :3], LABELS, layout="NHWC").train) == 16
