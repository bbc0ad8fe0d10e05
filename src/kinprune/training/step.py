"""One training step on a mini-batch, whole or in parts: what it learns from, and the gradients it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kinprune.evaluation import device_of
from kinprune.preprocessing import Preprocessing, normalise
from kinprune.training.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Lesson:
    """What every step of a fine-tuning shares: who learns, from whom, and how."""

    model: nn.Module
    teacher: nn.Module | None
    preprocessing: Preprocessing
    recipe: Recipe
    precision: str

    def autocast(self, *, cache: bool) -> AbstractContextManager[None]:
        on = self.precision == "bfloat16"
        return torch.autocast(device_of(self.model).type, torch.bfloat16, enabled=on, cache_enabled=cache)


@torch.no_grad()
def teach(lesson: Lesson, images: Tensor, at_once: int) -> Tensor | None:
    """The teacher's answers to ``uint8 [n, 3, h, w]``, ``at_once`` images at a time; None without a teacher."""
    if lesson.teacher is None:
        return None
    device = device_of(lesson.model)
    answers = []
    # Copies of the weights in half precision are dropped as soon as they were used: the teacher may be large.
    with lesson.autocast(cache=False):
        for part in torch.split(images, at_once):
            answers.append(lesson.teacher(normalise(part.to(device), lesson.preprocessing)).float())
    return answers[0] if len(answers) == 1 else torch.cat(answers)


def learn(lesson: Lesson, images: Tensor, labels: Tensor, target: Tensor | None, parts: int) -> Tensor:
    """Add the gradients of the mean loss over a mini-batch to those of the model; the loss, a scalar on the device.

    The mini-batch goes through the model in ``parts`` of nearly equal size, each weighted by its share: the gradients
    are those of the whole, up to rounding, where images do not meet in a layer, as they do in batch norm.
    """
    losses = []
    targets: Sequence[Tensor | None] = [None] * parts if target is None else target.tensor_split(parts)
    for some, wanted, taught in zip(images.tensor_split(parts), labels.tensor_split(parts), targets, strict=True):
        losses.append(learn_part(lesson, some, wanted, taught, 1 if parts == 1 else len(some) / len(images)))
    return losses[0] if parts == 1 else torch.stack(losses).sum()


def learn_part(lesson: Lesson, images: Tensor, labels: Tensor, target: Tensor | None, share: float) -> Tensor:
    """Add ``share`` of the gradients of the mean loss over some images to those of the model; that loss, a scalar."""
    inputs = normalise(images.to(device_of(lesson.model)), lesson.preprocessing)
    with lesson.autocast(cache=True):
        outputs = lesson.model(inputs)
    loss = _loss(outputs.float(), labels, target, lesson.recipe)
    if share != 1:
        loss = loss * share
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _loss(outputs: Tensor, labels: Tensor, target: Tensor | None, recipe: Recipe) -> Tensor:
    loss = functional.cross_entropy(outputs, labels, label_smoothing=recipe.label_smoothing)
    if target is None:
        return loss
    heat = recipe.distillation_temperature
    own, wanted = (outputs / heat).log_softmax(1), (target / heat).log_softmax(1)
    divergence = functional.kl_div(own, wanted, reduction="batchmean", log_target=True)
    return (1 - recipe.distillation) * loss + recipe.distillation * heat**2 * divergence
