"""What is exported: a model of one's own to work on, its classes and preprocessing, and a place for the file.

Every format is run and compared with PyTorch on the same random images before its file is moved into place.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinprune.artifact import Artifact
from kinprune.artifact.files import settle, settle_names
from kinprune.errors import ExportError
from kinprune.preprocessing import Preprocessing

CHECKED_BATCHES = (1, 2, 5)


@dataclass(frozen=True)
class Source:
    """A model in float32, evaluation mode and on the CPU, which may be changed, with what its file is to say."""

    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def source_of(
    model: Artifact | nn.Module, classes: Sequence[str] | None, preprocessing: Preprocessing | None
) -> Source:
    """An artifact, or a model with its ``classes`` and ``preprocessing``, as a source. Raises ExportError."""
    if isinstance(model, Artifact):
        return Source(_own_copy(model.model), model.classes, model.preprocessing)
    if classes is None or preprocessing is None:
        raise ExportError("a model is given without its classes or preprocessing: give both, or an artifact")
    return Source(_own_copy(model), tuple(classes), preprocessing)


def check_classes(source: Source, seed: int) -> None:
    """Refuse, with ExportError, a model that does not run or makes another number of logits than it has classes."""
    outputs = run(source.model, random_images(source.preprocessing, 1, seed)).shape[1]
    if outputs != len(source.classes):
        raise ExportError(
            f"{len(source.classes)} classes are given, but the model makes {outputs} logits: name every class"
        )


def check_target(path: Path, suffix: str) -> Path:
    """Refuse, with ExportError, a path that no file of this kind can be written to."""
    folder = path.absolute().parent
    if path.suffix != suffix:
        raise ExportError(f"{path} does not end in {suffix}: add it")
    if path.is_dir():
        raise ExportError(f"{path} is a folder, expected a file: choose another name")
    if not folder.is_dir():
        raise ExportError(f"the folder {folder} is not there, so {path.name} cannot be written: make it first")
    if not os.access(folder, os.W_OK):
        raise ExportError(f"the folder {folder} may not be written to: choose another one")
    return path


def random_images(preprocessing: Preprocessing, batch: int, seed: int) -> Tensor:
    """Normalised images of noise, ``float32 [batch, 3, h, w]``."""
    return torch.randn(batch, 3, *preprocessing.image_size, generator=torch.Generator().manual_seed(seed + batch))


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> Tensor:
    """A model's logits. Raises ExportError where it does not run, or gives none."""
    try:
        answers: Any = model(images)
    except RuntimeError as error:
        raise ExportError(f"the model does not run on images of {list(images.shape)}: {error}") from error
    if not isinstance(answers, Tensor) or answers.dim() != 2 or len(answers) != len(images):
        raise ExportError("the model gives no logits [batch, classes]: export an image classifier")
    return answers


def greatest_difference(
    source: Source,
    answer: Callable[[Tensor], NDArray[np.float32]],
    runtime: str,
    seed: int,
    batches: Sequence[int] = CHECKED_BATCHES,
) -> float:
    """How far ``answer`` is from the model on random images, in parts of the greatest logit where that is above 1.

    NaN where an answer is. Raises ExportError, naming the ``runtime``, where it fails or gives another shape.
    """
    worst = 0.0
    for batch in batches:
        images = random_images(source.preprocessing, batch, seed)
        expected = run(source.model, images).numpy()
        try:
            found = answer(images)
        except Exception as error:  # runtimes' errors have no base of their own; the cause stays attached
            raise ExportError(f"{runtime} cannot run the model on a batch of {batch}: {error}") from error
        if found.shape != expected.shape:
            raise ExportError(f"{runtime} answers {list(found.shape)}, expected {list(expected.shape)}")
        scale = max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(found - expected).max()) / scale
        worst = difference if not difference <= worst else worst  # NaN is the worst
    return worst


def publish(temporary: Path, target: Path) -> int:
    """Move the model's files into place, its weights first where they are apart; returns their size."""
    settle(temporary)
    files = sorted(temporary.iterdir(), key=lambda file: file.name == target.name)
    size = sum(file.stat().st_size for file in files)
    for file in files:
        file.replace(target.with_name(file.name))
    settle_names(target.absolute().parent)
    return size


def _own_copy(model: nn.Module) -> nn.Module:
    """The model in float32, evaluation mode and on the CPU; tensors that are so already are shared."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        value = tensor.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    own = copy.deepcopy(model, memo).eval()
    for module in own.modules():
        # PyTorch translates operations in place by way of many small ones, which takes twice the time.
        if vars(module).get("inplace") is True:
            module.inplace = False  # type: ignore[assignment]
        # timm's own matrix products instead of PyTorch's fused attention, which is translated to twice as many
        # operations: a seventh of the time of a small ViT in ONNX Runtime.
        if vars(module).get("fused_attn") is True:
            module.fused_attn = False  # type: ignore[assignment]
    return own
