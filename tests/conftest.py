"""What several tests share: the real data where it is there, and small image folders made on the spot."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data (``data/``) and pre-trained weights (``weights/``); skips where it is absent."""
    root = Path(os.environ.get("KINPRUNE_SHARED") or REPOSITORY.parent / "shared")
    if not (root / "data").is_dir():
        pytest.skip(f"no real data in {root}: set KINPRUNE_SHARED to a folder with data/ and weights/")
    return root


def class_image(name: str, number: int, size: int | tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels uint8 [h, w, 3] of a class's image: the class's own colours and stripes, the image's own noise.

    Classes can be told apart, so that a model trained on such images gets better.
    """
    height, width = (size, size) if isinstance(size, int) else size
    of_class = np.random.default_rng(zlib.crc32(name.encode()))
    of_image = np.random.default_rng([zlib.crc32(name.encode()), number])
    period, base, stripe = of_class.integers(2, 7), of_class.integers(30, 120, 3), of_class.integers(60, 110, 3)
    phase = np.arange(height)[:, None] if of_class.random() < 0.5 else np.arange(width)[None, :]
    on = (phase + of_image.integers(period)) // period % 2
    pixels = base + np.broadcast_to(on, (height, width))[..., None] * stripe
    return np.clip(pixels + of_image.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def write_folder(root: Path, classes: Sequence[str], per_class: int, size: int | tuple[int, int] = 16) -> Path:
    """Write ``per_class`` PNG images for each class into ``root/<class>/`` and return ``root``."""
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            Image.fromarray(class_image(name, number, size)).save(root / name / f"{number:04d}.png")
    return root


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """``make_folder(root, classes, per_class, size=16)``: an image folder to learn from; see ``write_folder``."""
    return write_folder


@pytest.fixture(scope="session")
def make_pixels() -> Callable[..., NDArray[np.uint8]]:
    """``make_pixels(class_name, number, size)``: one image of such a folder, uint8 [h, w, 3]."""
    return class_image
