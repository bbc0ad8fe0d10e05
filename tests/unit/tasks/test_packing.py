"""Packed sources: the same tasks are taken of them, with the same pixels, and nothing is held that no task takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kinprune.errors import TaskError
from kinprune.preprocessing import Preprocessing
from kinprune.tasks import decode
from kinprune.tasks.loading import open_source
from kinprune.tasks.packing import PackedReader, pack_source
from kinprune.tasks.splitting import Choice, take_task
from kinprune.tasks.task import Labelled
from kinprune.tasks.torchvision_sets import read_torchvision

PREPROCESSING = Preprocessing(image_size=(12, 12))
CHOICES = (Choice(("pear", "fig"), shots=3), Choice(("fig", "plum"), shots=2), Choice(("pear", "plum"), seed=5))


class Pictures:
    """A map-style data set of pictures in several modes."""

    classes = ("apple", "pear", "plum", "fig")

    def __init__(self, number: int) -> None:
        rng = np.random.default_rng(number)
        self.targets = [row % 4 for row in range(40)]
        pixels = rng.integers(0, 256, (40, 14, 14, 4), dtype=np.uint8)
        modes = {0: "RGB", 1: "L", 2: "RGBA", 3: "P"}
        self.images = [Image.fromarray(pixels[row]).convert(modes[row // 4 % 4]) for row in range(40)]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return self.images[row], self.targets[row]


@pytest.fixture(params=["folder", "parts", "parquet", "pictures"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, make_folder: Callable[..., Path]) -> Labelled:
    classes = Pictures.classes
    if request.param == "folder":
        return open_source(make_folder(tmp_path / "fruit", classes, 8, 14))
    if request.param == "parts":
        make_folder(tmp_path / "fruit" / "train", classes, 8, 14)
        make_folder(tmp_path / "fruit" / "test", classes, 4, 14)
        return open_source(tmp_path / "fruit")
    if request.param == "pictures":
        return read_torchvision(Pictures(0), Pictures(1), name="pictures")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = make_folder(tmp_path / "fruit", classes, 8, 14)
    files = sorted(root.glob("*/*.png"))
    images = arrow.array([{"bytes": file.read_bytes(), "path": file.name} for file in files])
    parquet.write_table(
        arrow.table({"image": images, "label": [file.parent.name for file in files]}), tmp_path / "fruit.parquet"
    )
    return open_source(tmp_path / "fruit.parquet")


def test_tasks_of_a_packed_source_are_the_same(opened: Labelled) -> None:
    tasks = [take_task(opened, choice) for choice in CHOICES]
    packed = pack_source(opened, tasks)
    assert packed.name == opened.name and set(packed.classes) == {"pear", "plum", "fig"}
    for task, choice in zip(tasks, CHOICES, strict=True):
        again = take_task(packed, choice)
        assert (again.name, again.classes, again.digest) == (task.name, task.classes, task.digest)
        found, expected = decode(again, PREPROCESSING), decode(task, PREPROCESSING)
        for part in ("train", "test"):
            assert torch.equal(getattr(found, part).images, getattr(expected, part).images)
            assert torch.equal(getattr(found, part).labels, getattr(expected, part).labels)
        assert again.train.reader.where(0).strip() == again.train.reader.where(0) != ""


def test_only_the_images_of_tasks_are_held(opened: Labelled) -> None:
    few, all_of_them = Choice(("pear", "fig"), shots=1), Choice(("pear", "fig"))
    packed = pack_source(opened, [take_task(opened, few)])
    whole = pack_source(opened, [take_task(opened, all_of_them)])
    held, held_whole = packed.train.reader, whole.train.reader
    assert isinstance(held, PackedReader) and isinstance(held_whole, PackedReader)
    assert 0 < len(held.content) < len(held_whole.content)
    with pytest.raises(TaskError, match="was not packed"):
        decode(take_task(packed, all_of_them), PREPROCESSING)
    assert set(packed.train.rows) == {"pear", "fig"}


def test_a_damaged_picture_is_named(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    """Files are sent as they are, damaged or not; whoever decodes them says which one it is."""
    root = make_folder(tmp_path / "fruit", ("pear", "fig"), 4, 14)
    (root / "fig" / "0001.png").write_bytes(b"no picture")
    opened = open_source(root)
    packed = pack_source(opened, [take_task(opened, Choice())])
    with pytest.raises(TaskError, match=r"fig.0001\.png cannot be read as an image"):
        decode(take_task(packed, Choice()), PREPROCESSING)
    (root / "fig" / "0001.png").unlink()
    with pytest.raises(TaskError, match=r"fig.0001\.png cannot be read"):
        pack_source(opened, [take_task(opened, Choice())])
