"""How good a model is on a task: probabilities, accuracy, loss and the confusion of its classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kinprune.errors import TaskError
from kinprune.preprocessing import Preprocessing, normalise
from kinprune.tasks import Split


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model answered on a split.

    ``accuracy`` is the share of images right, ``loss`` the mean cross-entropy in nats, ``confusion`` an int64 array
    ``[k, k]`` (row: true class, column: answer), ``per_class`` the accuracy of each class, None for a class without
    images, and ``n`` the number of images.
    """

    accuracy: float
    loss: float
    confusion: NDArray[np.int64]
    per_class: tuple[float | None, ...]
    n: int

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "confusion": self.confusion.tolist(),
            "per_class": list(self.per_class),
            "n": self.n,
        }


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; the CPU for a model that has neither."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def at_once(device: torch.device) -> int:
    """How many images pass a model at a time where no gradients are wanted.

    On a CPU what more images make no longer fits its caches: at 128, MobileNetV2 (96 px) takes nearly three times as
    long as at 32, a ResNet-18 (64 px) with a tenth of its units two thirds more.
    """
    return 32 if device.type == "cpu" else 128


def in_batches(images: Tensor, size: int) -> Sequence[Tensor]:
    """Images in nearly equal batches of at most ``size``: kernels for very few images round differently."""
    return images.tensor_split(max(1, -(-len(images) // size)))


def lay_out(model: nn.Module, *, fast: bool = True) -> None:
    """Put a model's weights, in place, into the memory format in which it runs fastest, or back into the usual one.

    Channels last takes a third to a half off a pass of a CNN on the CPU; a ViT's one convolution gains nothing.
    """
    if sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1:
        model.to(memory_format=torch.channels_last if fast else torch.contiguous_format)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def logits(
    model: nn.Module,
    images: Tensor,
    preprocessing: Preprocessing,
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> Tensor:
    """What the model in evaluation mode answers: ``uint8 [n, 3, h, w]`` to float32 ``[n, k]`` on the CPU.

    The model is moved to ``device`` where one is given, and stays there; None runs it where it is. At most
    ``batch_size`` images go through it at a time, ``at_once`` where it is None.
    """
    if len(images) == 0:
        raise TaskError("there is no image to run the model on; expected at least one: give the split some images")
    if batch_size is not None and batch_size < 1:
        raise TaskError(f"batch_size is {batch_size}; expected at least 1")
    if device is not None:
        model.to(device)
    target = device_of(model)
    with eval_mode(model):
        batches = in_batches(images, batch_size or at_once(target))
        return torch.cat([model(normalise(batch.to(target), preprocessing)).float().cpu() for batch in batches])


def predict(
    model: nn.Module,
    images: Tensor,
    preprocessing: Preprocessing,
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> Tensor:
    """The probability of every class: ``uint8 [n, 3, h, w]`` to float32 ``[n, k]`` on the CPU."""
    return logits(model, images, preprocessing, batch_size=batch_size, device=device).softmax(dim=1)


def evaluate(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> Evaluation:
    """Run the model on a split and count. Raises TaskError on an empty split or a label the model has no output for."""
    outputs = logits(model, split.images, preprocessing, batch_size=batch_size, device=device)
    return judge(outputs, split.labels)


def judge(outputs: Tensor, labels: Tensor) -> Evaluation:
    """Count logits ``[n, k]`` against labels ``int64 [n]``. Raises TaskError on a label without an output."""
    classes = outputs.shape[1]
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise TaskError(
            f"labels run from {lowest} to {highest} but the model answers {classes} classes (0 to {classes - 1}); "
            "give the model a head of the task's number of classes, or the task the model was made for"
        )
    answers = outputs.argmax(dim=1)
    counts = torch.bincount(labels * classes + answers, minlength=classes * classes).view(classes, classes)
    right, total = counts.diagonal().tolist(), counts.sum(dim=1).tolist()
    return Evaluation(
        accuracy=sum(right) / len(labels),
        loss=float(functional.cross_entropy(outputs, labels)),
        confusion=counts.numpy().astype(np.int64),
        per_class=tuple(r / t if t else None for r, t in zip(right, total, strict=True)),
        n=len(labels),
    )
