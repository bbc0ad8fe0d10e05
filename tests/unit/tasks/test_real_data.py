"""The real data sets: counted, split and decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kinprune.errors import TaskError
from kinprune.preprocessing import Preprocessing
from kinprune.tasks import decode, load_task


def test_trashnet(shared: Path) -> None:
    task = load_task(shared / "data" / "trashnet", shots=20)
    assert task.classes == ("cardboard", "glass", "metal", "paper", "plastic", "trash")
    assert len(task.train) == 120
    assert abs(len(task.test) - 2527 / 5) < 4
    small = load_task(shared / "data" / "trashnet", classes=["trash", "glass"], shots=5)
    assert small.train.rows[:5].tolist() == task.train.rows[100:105].tolist()
    decoded = decode(small, Preprocessing(image_size=(96, 96), crop_pct=0.875))
    assert decoded.train.images.shape == (10, 3, 96, 96)
    assert 60 < decoded.train.images.float().mean() < 220


def test_sign_digits(shared: Path) -> None:
    decoded = decode(load_task(shared / "data" / "sign-digits"), Preprocessing(image_size=(32, 32)))
    assert decoded.classes == tuple("0123456789")
    assert len(decoded.train) + len(decoded.test) == 2062
    assert decoded.test.labels.bincount().tolist() == [41] * 8 + [42, 41]  # a fifth of 204 to 208
    # Each image is a photograph of its own: no two alike in both parts.
    assert len(torch.cat([decoded.train.images, decoded.test.images]).flatten(1).unique(dim=0)) > 2000


def test_omniglot_is_grey(shared: Path) -> None:
    task = load_task(shared / "data" / "omniglot", shots=1)
    assert (len(task.classes), len(task.train), len(task.test)) == (242, 242, 968)
    images = decode(
        load_task(shared / "data" / "omniglot", classes=task.classes[:3]), Preprocessing((28, 28))
    ).train.images
    assert images.shape == (48, 3, 28, 28)
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])


def test_cifar100_parquet(shared: Path) -> None:
    pytest.importorskip("pyarrow", reason="parquet sources need pyarrow")
    source = shared / "data" / "cifar100"
    with pytest.raises(TaskError, match="label column may be 'fine_label', 'coarse_label'"):
        load_task(source)
    classes = ["whale", "apple", "rocket", "sea", "wolf"]
    task = load_task(source, classes=classes, label_column="fine_label", shots=50)
    assert (task.classes, len(task.train), len(task.test)) == (tuple(classes), 250, 500)
    decoded = decode(task, Preprocessing(image_size=(32, 32)))
    assert decoded.train.labels.bincount().tolist() == [50] * 5
    sea, apple = (decoded.train.images[decoded.train.labels == label].float().mean((0, 2, 3)) for label in (3, 1))
    assert sea[2] > sea[0] and apple[0] > apple[2]  # the sea is blue and apples are red
    coarse = load_task(source, label_column="coarse_label")
    assert (len(coarse.classes), len(coarse.train), len(coarse.test)) == (20, 50000, 10000)
