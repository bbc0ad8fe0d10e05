"""What a fine-tuning needs: the peak of memory of a plan, foretold by shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kinprune.calibration import batch_norms, frozen_batch_norm, is_folded
from kinprune.errors import TrainingError
from kinprune.evaluation import device_of, eval_mode
from kinprune.preprocessing import normalise
from kinprune.training.allocation import live_peak
from kinprune.training.freezing import Piece, pieces
from kinprune.training.memory import MemoryPlan, arranged
from kinprune.training.recipe import freezes_batch_norm
from kinprune.training.recomputation import blocks
from kinprune.training.step import Lesson, learn_part, teach
from kinprune.units.copies import copy_around

MARGIN, ALLOWANCE, KERNELS = 1.05, 10 * 2**20, 80 * 2**10
"""What is not seen in tensors, as measured (see benchmarks/training_memory.py): a share of a pass; the bytes
of small blocks that the C library keeps; and for each layer those of the kernels compiled for its shapes."""
LOOSE_MARGIN, LOOSE_ALLOWANCE = 2.0, 40 * 2**20
"""The same where free blocks are kept for later, as they are unless the plan is compact."""
Phase = Literal["learn", "teach", "judge"]


@dataclass(eq=False)
class Needs:
    """What a fine-tuning needs.

    ``images`` are some of the training images, ``uint8 [n, 3, h, w]``; ``moments`` how many numbers the optimiser
    keeps for a parameter; ``moved`` names the tensors that another state to train from changes: they must be kept,
    trained or not.
    """

    lesson: Lesson
    images: Tensor
    batch_size: int
    moments: int
    moved: frozenset[str] = frozenset()
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    peaks: dict[tuple[object, ...], int] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.lesson.model

    @cached_property
    def shapes(self) -> Lesson:
        """The lesson with a model and a teacher that have shapes and no numbers: a pass takes no memory."""
        teacher = None if self.lesson.teacher is None else self.shaped(self.lesson.teacher)
        return replace(self.lesson, model=self.shaped(self.model), teacher=teacher)

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
    def matrices(self) -> int:
        """The layers of the model and its teacher that multiply."""
        models = [self.model] if self.lesson.teacher is None else [self.model, self.lesson.teacher]
        return sum(value.ndim > 1 for model in models for name, value in model.named_parameters() if "weight" in name)

    @cached_property
    def folded(self) -> list[bool]:
        """For each batch norm, whether it stays frozen whatever the recipe says."""
        return [is_folded(norm) for norm in batch_norms(self.model)]

    @cached_property
    def statistics(self) -> bool:
        """Whether batches' own statistics are trained on, and so may not be of too few images."""
        return not all(self.folded) and not freezes_batch_norm(self.lesson.recipe, self.batch_size)

    def predict(self, plan: MemoryPlan) -> int:
        """The peak of a plan in bytes: that of its worst phase."""
        return max(self.bytes_of(plan, phase) for phase in ("judge", "teach", "learn"))

    def bytes_of(self, plan: MemoryPlan, phase: Phase) -> int:
        """The peak of one phase of a plan: what rests between steps, and the phase's own."""
        state = {name: size_of(value) for name, value in self.model.state_dict().items()}
        still = {name for layer in self.layers if layer.name in plan.frozen for name in layer.parameters}
        trained = [
            state[name] for name, value in self.model.named_parameters() if value.requires_grad and name not in still
        ]
        best = sum(size for name, size in state.items() if name in self.moved or name not in still)
        mini_batch = 3 * self.batch_size * self.images[0].numel()  # drawn, moved about, and laid out again
        rest = best + self.moments * sum(trained) + mini_batch
        if phase == "judge":
            own = self.pass_of(phase, plan, plan.judged_at_once)
        elif phase == "teach":
            own = self.pass_of(phase, plan, plan.taught_at_once)
        else:
            rest += sum(trained)
            # The optimiser's step makes a few tensors of the size of a parameter.
            own = max(self.pass_of(phase, plan, plan.micro_batch), 3 * max(trained, default=0))
        margin, allowance = (MARGIN, ALLOWANCE) if plan.compact else (LOOSE_MARGIN, LOOSE_ALLOWANCE)
        return rest + int(margin * own) + allowance + KERNELS * self.matrices

    def pass_of(self, phase: Phase, plan: MemoryPlan, images: int) -> int:
        """The bytes of tensors alive at the peak of a pass over so many images, above what rests.

        Raises TrainingError where the model cannot run by shapes alone.
        """
        if phase == "teach" and self.lesson.teacher is None:
            return 0
        how = (plan.recomputed, plan.frozen, self.freezes(plan)) if phase == "learn" else ()
        key = (phase, images, *how)
        if key not in self.peaks:
            try:
                self.peaks[key] = self.count(phase, plan, images)
            except (RuntimeError, NotImplementedError, TypeError) as error:
                raise TrainingError(
                    f"the memory of a training step cannot be foretold, for the model does not run by shapes alone: "
                    f"{str(error).splitlines()[0]}; leave out the limit of memory, or give the model a forward pass "
                    "that does not depend on values"
                ) from error
        return self.peaks[key]

    def count(self, phase: Phase, plan: MemoryPlan, images: int) -> int:
        lesson, model, _ = self.shapes, self.shapes.model, self.folded  # found before numbers are out of reach
        device = device_of(model)
        with self.mode:
            some = torch.empty((images, *self.images.shape[1:]), dtype=torch.uint8)
            if phase == "teach":
                return live_peak(lambda: teach(lesson, some, images))
            if phase == "judge":
                with eval_mode(model), torch.no_grad():
                    return live_peak(lambda: model(normalise(some.to(device), lesson.preprocessing)))
            labels = torch.zeros(images, dtype=torch.int64, device=device)
            with arranged(plan, model, self.layers), self.normed(model, plan):
                for parameter in model.parameters():  # gradients are there already, as for all parts but the first
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
                return live_peak(lambda: learn_part(lesson, some, labels, None, 1))

    @contextmanager
    def normed(self, model: nn.Module, plan: MemoryPlan) -> Iterator[None]:
        """A copy of the model in training mode, its batch norms frozen as in training."""
        every = self.freezes(plan)
        pairs = zip(batch_norms(model), self.folded, strict=True)
        fixed = {id(norm) for norm, folded in pairs if every or folded}
        model.train()
        with frozen_batch_norm(model, lambda norm: id(norm) in fixed):
            yield

    def shaped(self, model: nn.Module) -> nn.Module:
        tensors: dict[int, Tensor] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            shape = self.mode.from_tensor(tensor.detach())
            trained = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(shape, requires_grad=tensor.requires_grad) if trained else shape
        return copy_around(model, tensors)

    def freezes(self, plan: MemoryPlan) -> bool:
        """Whether batch norms are frozen."""
        return plan.norms_frozen or freezes_batch_norm(self.lesson.recipe, self.batch_size)

    def recomputes_exactly(self, names: tuple[str, ...]) -> bool:
        """Whether gradients and buffers are the same with these blocks recomputed, tried on two images.

        They are not where a block writes over what it was given, or keeps a state of its own.
        """
        found = []
        for recomputed in ((), names):
            with as_it_was(self.model):
                torch.manual_seed(0)
                try:
                    self.run(MemoryPlan(self.batch_size, recomputed=recomputed))
                except RuntimeError:  # autograd itself found that something was written over
                    return False
                gradients = [value.grad for value in self.model.parameters()]
                found.append((gradients, [buffer.clone() for buffer in self.model.buffers()]))
        (plain, buffers), (again, others) = found
        return all(map(_alike, plain, again)) and all(map(torch.equal, buffers, others))

    def run(self, plan: MemoryPlan) -> None:
        """Pass two images forwards and backwards, and let the teacher answer."""
        images = self.images[torch.arange(2) % len(self.images)]
        labels = torch.zeros(2, dtype=torch.int64, device=device_of(self.model))
        target = teach(self.lesson, images, 2)
        with arranged(plan, self.model, self.layers), self.normed(self.model, plan):
            learn_part(self.lesson, images, labels, target, 1)

    def warm_up(self, plan: MemoryPlan) -> None:
        """Run once as the plan says, so that what libraries load on first use is there before anything is measured."""
        with as_it_was(self.model):
            self.run(plan)


def size_of(tensor: Tensor) -> int:
    """The bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


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
