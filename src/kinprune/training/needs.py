"""What a fine-tuning needs: the peak of memory of a plan, counted on the model before any step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from kinprune.calibration import batch_norms, frozen_batch_norm, is_folded
from kinprune.evaluation import device_of, eval_mode
from kinprune.preprocessing import normalise
from kinprune.training.allocation import live_peak
from kinprune.training.freezing import Piece, names_of, pieces
from kinprune.training.memory import MemoryPlan, arranged
from kinprune.training.recipe import freezes_batch_norm
from kinprune.training.recomputation import blocks
from kinprune.training.step import Lesson, learn, teach

PROBED = 32
"""The most images of which memory is counted; beyond them it grows in a line."""
MARGIN, ALLOWANCE = 1.15, 6 * 2**20
"""What operations take inside themselves and what the C library cannot use again, as found by measurement (see
benchmarks/training_memory.py): a share of the tensors, and bytes."""
Phase = Literal["learn", "teach", "judge"]


@dataclass(eq=False)
class Needs:
    """What a fine-tuning needs, counted on the model itself, which is left as it was.

    ``images`` are some of the training images, ``uint8 [n, 3, h, w]``, on which memory is counted; ``moments`` how many
    numbers the optimiser keeps for a parameter; ``begun`` whether another state than the model's own is trained from,
    so that layers that are not trained differ from the best state too.
    """

    lesson: Lesson
    images: Tensor
    batch_size: int
    moments: int
    begun: bool
    peaks: dict[tuple[object, ...], int] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.lesson.model

    @cached_property
    def layers(self) -> list[Piece]:
        """The model's pieces, first to last."""
        inputs = normalise(self.images[:1].to(device_of(self.model)), self.lesson.preprocessing)
        return pieces(self.model, inputs, blocks(self.model))

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that may be recomputed: none where that does not give the same gradients."""
        found = tuple(blocks(self.model))
        return found if found and self.recomputes_exactly(found) else ()

    @cached_property
    def statistics(self) -> bool:
        """Whether batches' own statistics are trained on, and so may not be of too few images."""
        counted = any(not is_folded(norm) for norm in batch_norms(self.model))
        return counted and not freezes_batch_norm(self.lesson.recipe, self.batch_size)

    def bytes_of(self, plan: MemoryPlan, phase: Phase) -> int:
        """The peak of one phase of a plan."""
        trained = [value.numel() * value.element_size() for value in self.trained(plan)]
        mini_batch = 3 * self.batch_size * self.images[0].numel()  # drawn, moved about, and laid out again
        size = self.kept(plan) + self.moments * sum(trained) + mini_batch
        if phase == "judge":
            size += self.pass_of(phase, plan, plan.judged_at_once)
        elif phase == "teach" and self.lesson.teacher is not None:
            size += self.pass_of(phase, plan, plan.taught_at_once)
        elif phase == "learn":
            # The optimiser's step makes some tensors of the size of a parameter.
            size += sum(trained) + max(self.pass_of(phase, plan, plan.micro_batch), 3 * max(trained, default=0))
        return int(MARGIN * size) + ALLOWANCE

    def predict(self, plan: MemoryPlan) -> int:
        """The peak of a plan: that of its worst phase."""
        return max(self.bytes_of(plan, phase) for phase in ("judge", "teach", "learn"))

    def kept(self, plan: MemoryPlan) -> int:
        """The bytes of the best state."""
        still = set() if self.begun else names_of(self.model, self.frozen(plan))
        state = self.model.state_dict().items()
        return sum(value.numel() * value.element_size() for name, value in state if name not in still)

    def frozen(self, plan: MemoryPlan) -> list[Piece]:
        return [layer for layer in self.layers if layer.name in plan.frozen]

    def trained(self, plan: MemoryPlan) -> list[nn.Parameter]:
        still = {id(value) for layer in self.frozen(plan) for value in layer.parameters}
        return [value for value in self.model.parameters() if value.requires_grad and id(value) not in still]

    def pass_of(self, phase: Phase, plan: MemoryPlan, images: int) -> int:
        """The peak of the tensors of a pass over so many images, above what rests."""
        if phase == "learn" and not self.freezes(plan):
            images = max(images, 2)  # a channel of one value has no statistics
        if images <= PROBED:
            return self.counted(phase, plan, images)
        half, full = self.counted(phase, plan, PROBED // 2), self.counted(phase, plan, PROBED)
        return full + (images - PROBED) * (full - half) // (PROBED - PROBED // 2)

    def counted(self, phase: Phase, plan: MemoryPlan, images: int) -> int:
        how = (plan.recomputed, plan.frozen, self.freezes(plan)) if phase == "learn" else ()
        key = (phase, images, *how)
        if key not in self.peaks:
            some = self.images[torch.arange(images) % len(self.images)]
            with as_it_was(self.model), arranged(plan, self.model, self.layers):
                self.peaks[key] = self.count(phase, plan, some)
        return self.peaks[key]

    def count(self, phase: Phase, plan: MemoryPlan, images: Tensor) -> int:
        device = device_of(self.model)
        if phase == "teach":
            return live_peak(lambda: _drop(teach(self.lesson, images, len(images))), device)
        if phase == "judge":
            with eval_mode(self.model), torch.no_grad():
                return live_peak(lambda: self.model(normalise(images.to(device), self.lesson.preprocessing)), device)
        frozen = self.freezes(plan)
        # Two images, for statistics need more than one value a channel; then gradients are there, as for later parts.
        self.learn(images[:2], frozen)
        return live_peak(lambda: self.learn(images, frozen), device)

    def learn(self, images: Tensor, frozen: bool) -> None:
        """A forward and a backward pass, as in training."""
        self.model.train()
        labels = torch.zeros(len(images), dtype=torch.int64, device=device_of(self.model))
        with frozen_batch_norm(self.model, lambda norm: frozen or is_folded(norm)):
            learn(self.lesson, images, labels, None, 1)

    def freezes(self, plan: MemoryPlan) -> bool:
        """Whether batch norms are frozen."""
        return plan.norms_frozen or freezes_batch_norm(self.lesson.recipe, self.batch_size)

    def recomputes_exactly(self, names: tuple[str, ...]) -> bool:
        """Whether gradients and buffers are the same with these blocks recomputed, tried on two images.

        They are not where a block writes over what it was given, or keeps a state of its own.
        """
        found = []
        for recomputed in ((), names):
            plan = MemoryPlan(self.batch_size, recomputed=recomputed)
            with as_it_was(self.model), arranged(plan, self.model, self.layers):
                torch.manual_seed(0)
                try:
                    self.learn(self.images[torch.arange(2) % len(self.images)], self.freezes(plan))
                except RuntimeError:  # autograd itself found that something was written over
                    return False
                gradients = [None if value.grad is None else value.grad for value in self.model.parameters()]
                found.append((gradients, [buffer.clone() for buffer in self.model.buffers()]))
        (plain, buffers), (again, others) = found
        return all(map(_alike, plain, again)) and all(map(torch.equal, buffers, others))


def _drop(answers: Tensor | None) -> None:
    """Nobody holds the answers after the pass."""


def _alike(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    if first.device.type == "cpu":
        return torch.equal(first, second)
    # Sums on a GPU come in any order.
    return torch.allclose(first, second, rtol=1e-2, atol=1e-3 * float(first.abs().max()))


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Modes, buffers and the random state are put back afterwards, and gradients are gone."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = device_of(model)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
        for parameter in model.parameters():
            parameter.grad = None
