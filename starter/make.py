"""Make the starter: a bank of a small pre-trained model, and photos of a task that the bank has not seen.

    python starter/make.py --weights vit_tiny_patch16_224.safetensors --cifar100 DIR --omniglot DIR --signs DIR

The model's weights are rounded to half precision first, so that the bank holds them in half the bytes without changing
a number. Run again, it goes on where it stopped. It takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
BANK, PHOTOS = HERE / "bank.db", HERE / "photos"
MODEL, SIDE = "vit_tiny_patch16_224", 96
UNSEEN, PHOTOS_A_CLASS = ("5", "6", "7", "8", "9"), 60


def main() -> None:
    """Build the bank with ``kinprune bank build``, and choose the photos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "cifar100", "omniglot", "signs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = halve(options.weights, Path(folder) / "weights.safetensors")
        build(weights, options.cifar100, "--label-column", "fine_label", "--shots", "100", tasks=5, classes=5)
        build(weights, options.signs, "--leave-out", ",".join(UNSEEN), tasks=3, classes=4)
        build(weights, options.omniglot, tasks=2, classes=5)
    choose_photos(options.signs)


def halve(source: Path, target: Path) -> Path:
    """The same weights rounded to half precision, in a file of single precision."""
    with safe_open(source, "pt") as file:
        tensors = {name: file.get_tensor(name).half().float() for name in file.keys()}  # noqa: SIM118
        save_file(tensors, target, file.metadata())
    return target


def build(weights: Path, data: Path, *more: str, tasks: int, classes: int) -> None:
    """Source tasks of one data set into the bank."""
    kinprune = Path(sys.executable).with_name("kinprune")
    options = {
        "bank": BANK,
        "model": MODEL,
        "weights": weights,
        "image-size": SIDE,
        "tasks": tasks,
        "classes": classes,
        "steps": 120,
        "broad-steps": 0,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # A record says where its data were: only their name is for all to read.
    subprocess.run([kinprune, "bank", "build", data.name, *words, *more], cwd=data.resolve().parent, check=True)


def choose_photos(signs: Path) -> None:
    """Some photos of the unseen classes, in a folder a class, drawn with a seed."""
    for name in UNSEEN:
        place = PHOTOS / f"sign-{name}"
        place.mkdir(parents=True, exist_ok=True)
        photos = sorted((signs / name).iterdir())
        for photo in random.Random(0).sample(photos, PHOTOS_A_CLASS):
            shutil.copyfile(photo, place / photo.name)


if __name__ == "__main__":
    main()
