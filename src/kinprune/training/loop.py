"""The one fine-tuning loop: guarded by held-back images, it never ends below its start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kinprune.calibration import frozen_batch_norm, is_folded, reestimate_batch_norm
from kinprune.errors import TaskError, TrainingError
from kinprune.evaluation import device_of, lay_out, logits
from kinprune.preprocessing import Preprocessing, normalise
from kinprune.tasks import Split
from kinprune.training.batches import batches, hold_back, shift_and_flip
from kinprune.training.recipe import (
    Recipe,
    default_rate,
    freezes_batch_norm,
    make_optimiser,
    optimiser_name,
    resolve_precision,
    schedule,
)

OnStep = Callable[[int, int, float], None]


HEATS = tuple(2 ** (power / 2) for power in range(-2, 5))
"""Temperatures, from a half to four, of which a state is judged under the one that suits it best: training makes
answers too sure long before it makes them worse."""


@dataclass(frozen=True)
class CurvePoint:
    """The model judged after ``step`` steps on the guard's images.

    ``calibrated`` is the cross-entropy under the best temperature, by which states are chosen: over few images it
    tells states apart that accuracy does not.
    """

    step: int
    accuracy: float
    loss: float
    calibrated: float


@dataclass(frozen=True)
class TrainingResult:
    """What a fine-tuning did.

    ``losses`` is the mean loss of each step's batch; ``curve`` the judgements; ``best_step`` the step whose state the
    model was left in; ``guard`` the images it was judged by: those held back, or the training images where a class
    had too few; ``stopped`` whether it was interrupted. ``optimiser``, ``learning_rate`` and ``precision`` are what
    the recipe's defaults became.
    """

    losses: tuple[float, ...]
    curve: tuple[CurvePoint, ...]
    best_step: int
    guard: Literal["held-back", "training"]
    stopped: bool
    seconds: float
    images_seen: int
    optimiser: str
    learning_rate: float
    precision: str


def fine_tune(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    on_step: OnStep | None = None,
    teacher: nn.Module | None = None,
    held_back: Split | None = None,
    begin: Mapping[str, Tensor] | None = None,
) -> TrainingResult:
    """Train ``model`` in place on ``device``, where it stays, and leave it in the best state seen, in evaluation mode.

    The best state, the start among them, is the one of least calibrated loss on the guard's images (see
    ``CurvePoint``). The guard is ``held_back`` where it is given, else ``hold_back`` takes it from ``split``, else,
    where a class has one image or nothing is to be held back, it is the training images. ``on_step(step, steps,
    loss)`` is called after every step, steps counted from 1. ``teacher``, of the same classes, adds distillation: the
    Kullback-Leibler divergence of softened answers times the squared temperature (Hinton et al. 2015). ``begin`` is
    another state of the model to train from, such as ``ClosedForm.trainable``; the model's own stays the start that
    is never undercut.

    A KeyboardInterrupt ends training, not the program: the result says ``stopped``. A non-finite loss raises
    TrainingError. Whatever happens, an error of ``on_step`` too, the model is left in its best state. The same seed
    gives the same model, bit for bit, on the CPU; the global random state is left as it was. Folded batch norms (see
    ``calibration.is_folded``), and any where a batch is a single image, stay frozen whatever the recipe says.
    """
    _check(model, split, preprocessing, teacher, torch.device(device))
    train, guard = (split, held_back) if held_back is not None else hold_back(split, recipe.hold_back, recipe.seed)
    optimiser = optimiser_name(model, recipe)
    run = _Run(
        model=model,
        train=train,
        guard=train if guard is None else guard,
        guarded=guard is not None,
        preprocessing=preprocessing,
        recipe=recipe,
        optimiser=optimiser,
        learning_rate=recipe.learning_rate or default_rate(optimiser, recipe.steps),
        precision=resolve_precision(recipe, torch.device(device)),
        teacher=teacher,
        begin=begin,
    )
    started = perf_counter()
    stopped = False
    try:
        with _surroundings(run, torch.device(device)):
            run.go(on_step)
    except KeyboardInterrupt:
        stopped = True
    finally:
        run.restore()
        lay_out(model, fast=False)
        model.eval()
    return run.result(stopped, perf_counter() - started)


def judge(model: nn.Module, split: Split, preprocessing: Preprocessing, step: int) -> CurvePoint:
    """How good a model is on a split, after ``step`` steps."""
    answers = logits(model, split.images, preprocessing)
    losses = [float(functional.cross_entropy(answers / heat, split.labels)) for heat in HEATS]
    accuracy = float((answers.argmax(1) == split.labels).double().mean())
    finite = all(math.isfinite(loss) for loss in losses)
    return CurvePoint(step, accuracy, losses[HEATS.index(1)], min(losses) if finite else math.inf)


@dataclass(eq=False)
class _Run:
    """A fine-tuning under way: what it works on, what it has seen, and the best state so far."""

    model: nn.Module
    train: Split
    guard: Split
    guarded: bool
    preprocessing: Preprocessing
    recipe: Recipe
    optimiser: str
    learning_rate: float
    precision: str
    teacher: nn.Module | None
    begin: Mapping[str, Tensor] | None
    counts: bool = False
    losses: list[float] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    best_step: int = 0
    least: float = math.inf
    best_state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        return min(self.recipe.batch_size, len(self.train.labels))

    def go(self, on_step: OnStep | None) -> None:
        recipe = self.recipe
        if recipe.steps == 0:
            return
        self.keep(0)
        self.least = self.judge(0)
        if self.begin is not None:
            _copy(self.model, self.begin)
        every = freezes_batch_norm(recipe, self.batch_size)
        self.counts = not every
        with frozen_batch_norm(self.model, lambda norm: every or is_folded(norm)):
            self.train_steps(on_step)

    def train_steps(self, on_step: OnStep | None) -> None:
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed)
        order = batches(len(self.train.labels), self.batch_size, generator)
        optimiser = make_optimiser(self.model, recipe, self.optimiser, self.learning_rate)
        checks = {round(i * recipe.steps / recipe.evaluations) for i in range(1, recipe.evaluations + 1)}
        for step in range(1, recipe.steps + 1):
            rate = self.learning_rate * schedule(step, recipe.steps, recipe.warmup)
            for group in optimiser.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            loss = self.step(next(order), optimiser, generator)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} at step {step} of {recipe.steps} (learning rate {rate:g}); expected a "
                    "finite number: lower the recipe's learning_rate, or set its precision to 'float32'. "
                    f"The model was put back to its best state, that of step {self.best_step}"
                )
            self.losses.append(loss)
            if step in checks:
                self.keep_if_best(step)
            if on_step is not None:
                on_step(step, recipe.steps, loss)

    def step(self, indices: Tensor, optimiser: torch.optim.Optimizer, generator: torch.Generator) -> float:
        """One step on a batch of the training images; its loss before the step."""
        device = device_of(self.model)
        images = self.train.images[indices]
        if self.recipe.augmentation == "light":
            images = shift_and_flip(images, generator, flip=self.recipe.flip)
        inputs = normalise(images.to(device), self.preprocessing)
        labels = self.train.labels[indices].to(device)
        self.model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            outputs = self.model(inputs)
            with torch.no_grad():
                target = None if self.teacher is None else self.teacher(inputs).float()
        loss = _loss(outputs.float(), labels, target, self.recipe)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        optimiser.step()
        return float(loss.detach())

    def judge(self, step: int) -> float:
        """Judge the model on the guard's images, in float32; the calibrated loss."""
        point = judge(self.model, self.guard, self.preprocessing, step)
        self.curve.append(point)
        return point.calibrated

    def keep_if_best(self, step: int) -> None:
        """Judge the model, its batch norms counted again: running averages lag behind by as many steps as are few."""
        if self.counts:
            images = self.train.images
            reestimate_batch_norm(self.model, images, self.preprocessing, max_images=256, seed=self.recipe.seed)
        calibrated = self.judge(step)
        if calibrated < self.least:
            self.least = calibrated
            self.keep(step)

    def keep(self, step: int) -> None:
        self.best_step = step
        self.best_state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def restore(self) -> None:
        _copy(self.model, self.best_state)

    def result(self, stopped: bool, seconds: float) -> TrainingResult:
        return TrainingResult(
            losses=tuple(self.losses),
            curve=tuple(self.curve),
            best_step=self.best_step,
            guard="held-back" if self.guarded else "training",
            stopped=stopped,
            seconds=seconds,
            images_seen=len(self.losses) * self.batch_size,
            optimiser=self.optimiser,
            learning_rate=self.learning_rate,
            precision=self.precision,
        )


@torch.no_grad()
def _copy(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        if name in state:
            tensor.copy_(state[name])


@contextmanager
def _surroundings(run: _Run, device: torch.device) -> Iterator[None]:
    """The model on its device in the layout that is fastest there, and a random state of its own."""
    with ExitStack() as stack:
        cuda = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.default_generator.manual_seed(run.recipe.seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(run.recipe.seed)
        run.model.to(device)
        if run.teacher is not None:
            run.teacher.to(device).eval()
        lay_out(run.model)
        yield


def _loss(outputs: Tensor, labels: Tensor, target: Tensor | None, recipe: Recipe) -> Tensor:
    loss = functional.cross_entropy(outputs, labels, label_smoothing=recipe.label_smoothing)
    if target is None:
        return loss
    heat = recipe.distillation_temperature
    own, wanted = (outputs / heat).log_softmax(1), (target / heat).log_softmax(1)
    divergence = functional.kl_div(own, wanted, reduction="batchmean", log_target=True)
    return (1 - recipe.distillation) * loss + recipe.distillation * heat**2 * divergence


def _check(
    model: nn.Module, split: Split, preprocessing: Preprocessing, teacher: nn.Module | None, device: torch.device
) -> None:
    if len(split.labels) == 0 or len(split.labels) != len(split.images):
        raise TaskError(
            f"{len(split.images)} images and {len(split.labels)} labels were given to train on; "
            "expected as many of both, at least one"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("no parameter of the model requires a gradient; unfreeze some: model.requires_grad_(True)")
    classes = logits(model, split.images[:1], preprocessing, device=device).shape[1]
    lowest, highest = int(split.labels.min()), int(split.labels.max())
    if lowest < 0 or highest >= classes:
        raise TaskError(
            f"labels run from {lowest} to {highest} but the model answers {classes} classes (0 to {classes - 1}); "
            "solve its head for the task's number of classes first"
        )
    if teacher is not None:
        taught = logits(teacher, split.images[:1], preprocessing, device=device).shape[1]
        if taught != classes:
            raise TrainingError(
                f"the teacher answers {taught} classes and the model {classes}; expected a teacher of the same task"
            )
