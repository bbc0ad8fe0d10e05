"""torchvision data sets: as objects and by name, their labels without decoding, their pixels as they are."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets, transforms

from kinprune.errors import TaskError
from kinprune.preprocessing import Preprocessing
from kinprune.tasks import decode, load_task, load_torchvision

PLAIN = Preprocessing(image_size=(28, 28))


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root: Path, train: int = 40, test: int = 20) -> Path:
    """MNIST's own files: image i is all of level i, of class i modulo 10."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        levels = np.arange(count, dtype=np.uint8)
        write_idx(raw / f"{part}-images-idx3-ubyte", np.broadcast_to(levels[:, None, None], (count, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", levels % 10)
    return root


class Listed:
    """A map-style data set of given items; counts how many were fetched."""

    def __init__(self, items: list[tuple[Any, int]], classes: Any = ("a", "b"), targets: Any = None) -> None:
        self.items, self.classes, self.fetched = items, classes, 0
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        self.fetched += 1
        return self.items[row]


def grey(level: int) -> Image.Image:
    return Image.new("L", (28, 28), level)


def test_by_name(tmp_path: Path) -> None:
    task = load_task(f"torchvision:MNIST?root={write_mnist(tmp_path)}", classes=["3 - three", "1 - one"], shots=2)
    assert (task.name, task.classes) == ("mnist", ("3 - three", "1 - one"))
    assert (len(task.train), len(task.test)) == (4, 4)
    decoded = decode(task, PLAIN)
    assert decoded.train.images[:, 0, 0, 0].tolist() == task.train.rows.tolist()
    assert [int(row) % 10 for row in task.train.rows] == [3, 3, 1, 1]


def test_by_name_without_parts(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    root = make_folder(tmp_path, ["cat", "dog"], 5)
    task = load_task(f"torchvision:ImageFolder?root={root}")
    assert (task.name, task.classes, len(task.train), len(task.test)) == ("imagefolder", ("cat", "dog"), 8, 2)


def test_by_name_with_splits_called_otherwise(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    base = tmp_path / "imagenette2"
    wnids = list(datasets.Imagenette._WNID_TO_CLASS)
    make_folder(base / "train", wnids, 3)
    make_folder(base / "val", wnids, 2)
    for path in base.glob("*/*/*.png"):
        path.rename(path.with_suffix(".jpeg"))  # the one suffix it looks for
    task = load_task(f"torchvision:Imagenette?root={tmp_path}")
    assert task.classes[0] == "tench, Tinca tinca"
    assert (len(task.train), len(task.test)) == (30, 20)


def test_refused_names(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no data set 'CIFAR1'; did you mean"):
        load_task("torchvision:CIFAR1?root=x")
    with pytest.raises(TaskError, match="torchvision:MNIST\\?root=DIR"):
        load_task("torchvision:MNIST")
    with pytest.raises(TaskError, match="MNIST has no option 'dwnload'; did you mean 'download'"):
        load_task("torchvision:MNIST?root=x&dwnload=1")
    with pytest.raises(TaskError, match=r"cannot be made.*download=1"):
        load_task(f"torchvision:MNIST?root={tmp_path}")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TaskError, match=r"cannot be made.*split"):
        load_task(f"torchvision:EMNIST?root={tmp_path}")
    with pytest.raises(TaskError, match="has no columns"):
        load_task(f"torchvision:MNIST?root={write_mnist(tmp_path)}", label_column="y")


def test_objects_are_not_fetched_before_decoding(tmp_path: Path) -> None:
    items = [(grey(row), row % 2) for row in range(10)]
    train, test = (Listed(items, targets=torch.tensor([row % 2 for row in range(10)])) for _ in range(2))
    task = load_torchvision(train, test, name="mine")
    assert (task.name, len(task.train), len(task.test), train.fetched) == ("mine", 10, 10, 0)
    assert decode(task, PLAIN).test.images[:, 0, 0, 0].tolist() == task.test.rows.tolist()
    assert load_torchvision(train, test, name="other").digest == task.digest


def test_labels_found_by_fetching_where_they_are_not_listed() -> None:
    dataset = Listed([(grey(row), row % 2) for row in range(10)], classes=[("ant", "emmet"), "bee"])
    task = load_torchvision(dataset)
    assert (task.classes, len(task.train), len(task.test)) == (("ant, emmet", "bee"), 8, 2)


def test_names_from_labels_or_given() -> None:
    dataset = Listed([(grey(row), row % 2) for row in range(10)])
    del dataset.classes
    assert load_torchvision(dataset).classes == ("0", "1")
    assert load_torchvision(dataset, class_names=["no", "yes"], classes="yes,no").classes == ("yes", "no")


def test_target_transform_is_heeded(tmp_path: Path) -> None:
    dataset = datasets.MNIST(write_mnist(tmp_path), target_transform=lambda label: 9 - int(label))
    task = load_torchvision(dataset)
    decoded = decode(task, PLAIN)
    assert torch.equal(decoded.train.labels, 9 - decoded.train.images[:, 0, 0, 0].long() % 10)


def test_tensors_are_pictures_too() -> None:
    pixels = torch.randint(0, 256, (12, 3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    forms: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda image: image, lambda image: image / 255]
    for form in forms:
        task = load_torchvision(Listed([(form(image), row % 2) for row, image in enumerate(pixels)]))
        assert torch.equal(decode(task, PLAIN).train.images, pixels[task.train.rows])
    to_tensor = transforms.ToTensor()
    task = load_torchvision(Listed([(to_tensor(grey(row)), row % 2) for row in range(8)]))
    assert decode(task, PLAIN).train.images[:, 2, 5, 5].tolist() == task.train.rows.tolist()


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (torch.full((3, 4, 4), 2.5), r"outside \[0, 1\].*normalising"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), "1, 3 or 4 channels"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "torch.int32"),
        ("picture", "is a str; expected a PIL image or a tensor"),
    ],
)
def test_refused_pictures(image: Any, match: str) -> None:
    with pytest.raises(TaskError, match=match):
        decode(load_torchvision(Listed([(image, row % 2) for row in range(4)])), PLAIN)


def test_refused_objects() -> None:
    with pytest.raises(TaskError, match="is a generator; expected a map-style data set"):
        load_torchvision(row for row in range(3))
    items = [(grey(row), row % 2) for row in range(4)]
    with pytest.raises(TaskError, match=r"item 3 of .* has the label 2; expected 0 to 1"):
        load_torchvision(Listed(items, targets=[0, 1, 0, 2]))
    with pytest.raises(TaskError, match=r"expected one whole number an image, \[4\]"):
        load_torchvision(Listed(items, targets=[0, 1]))
    with pytest.raises(TaskError, match="is labelled 0, its list of labels says 1"):
        decode(load_torchvision(Listed(items, targets=[1, 1, 0, 0])), PLAIN)


def test_a_damaged_file_is_named(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    root = make_folder(tmp_path, ["a", "b"], 3)
    (root / "b" / "0001.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(TaskError, match=r"item 4 of .* cannot be read"):
        decode(load_torchvision(datasets.ImageFolder(str(root))), PLAIN)
