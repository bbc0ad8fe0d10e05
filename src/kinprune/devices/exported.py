"""Exported files of any format, run alike: ONNX by ONNX Runtime alone, the others by PyTorch's and ExecuTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kinprune.devices.runtime import OnnxMetadata, answers, check_images, metadata_of, normalised, open_session
from kinprune.errors import ExportError

if TYPE_CHECKING:  # ONNX files are run where there is no PyTorch
    from kinprune.evaluation import Evaluation
    from kinprune.tasks import Split

SUFFIXES = {"onnx": ".onnx", "executorch": ".pte", "pt2": ".pt2"}
"""The formats, and how the names of their files end."""


@dataclass(frozen=True, eq=False)
class Exported:
    """An exported model, ready to run: ``answer`` takes batches of normalised images, ``float32 [b, 3, h, w]``."""

    path: Path
    format: str
    metadata: OnnxMetadata
    answer: Callable[[Sequence[NDArray[np.float32]]], NDArray[np.float32]]

    def logits(self, images: NDArray[np.uint8], *, batch_size: int = 32) -> NDArray[np.float32]:
        """What the model answers: ``uint8 [n, 3, h, w]`` to float32 ``[n, k]``. Raises ExportError on others."""
        check_images(images, self.metadata.preprocessing, batch_size)
        return self.answer(normalised(images, self.metadata.preprocessing, batch_size))


def is_exported(path: Path) -> bool:
    """Whether a path is named as an exported file is, and no artifact's directory."""
    return path.suffix in SUFFIXES.values() and not path.is_dir()


def open_exported(path: str | Path, *, threads: int | None = None) -> Exported:
    """Open an exported file of any format; ``threads`` is for ONNX Runtime, others take PyTorch's.

    Raises ExportError for a file that is none, is damaged, or needs what is not installed.
    """
    place = Path(path).expanduser()
    if place.suffix == ".onnx":
        session = open_session(place, threads=threads)
        metadata = metadata_of(session, place)
        return Exported(place, "onnx", metadata, lambda batches: answers(session, list(batches)))
    if place.suffix == ".pt2":
        from kinprune.devices.pt2 import open_pt2

        return Exported(place, "pt2", *open_pt2(place))
    if place.suffix == ".pte":
        from kinprune.devices.executorch import open_executorch

        return Exported(place, "executorch", *open_executorch(place))
    raise ExportError(f"{place} is no exported model, expected a name that ends in {', '.join(SUFFIXES.values())}")


def evaluate_exported(
    path: str | Path, split: Split, *, batch_size: int = 32, threads: int | None = None
) -> Evaluation:
    """Run an exported file on a split by its own runtime and count, as ``evaluate`` does for a model.

    Raises ExportError for a file that cannot be used or images of another size, TaskError for labels without an
    output.
    """
    import torch

    from kinprune.evaluation import judge

    found = open_exported(path, threads=threads).logits(split.images.numpy(), batch_size=batch_size)
    return judge(torch.from_numpy(found), split.labels)
