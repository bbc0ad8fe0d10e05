"""The one fine-tuning loop: guarded by held-back images, it never ends below its start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kinprune.calibration import frozen_batch_norm, is_folded, reestimate_batch_norm
from kinprune.errors import TaskError, TrainingError
from kinprune.evaluation import at_once, device_of, lay_out, logits
from kinprune.preprocessing import Preprocessing
from kinprune.tasks import Split
from kinprune.training.batches import batches, hold_back, shift_and_flip
from kinprune.training.freezing import Piece
from kinprune.training.memory import COUNTED, MemoryPlan, TrainingMemory, arranged, remember
from kinprune.training.needs import Needs
from kinprune.training.planning import plan_memory
from kinprune.training.recipe import (
    MOMENTS,
    Recipe,
    default_rate,
    freezes_batch_norm,
    make_optimiser,
    optimiser_name,
    resolve_precision,
    schedule,
)
from kinprune.training.resident import Watch, give_back_unused, returned_at_once
from kinprune.training.step import Lesson, learn, teach

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
    the recipe's defaults became. ``memory`` is what was planned and measured under a limit of memory, None without one.
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
    memory: TrainingMemory | None = None


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
    memory_limit: int | None = None,
    answers: Tensor | None = None,
) -> TrainingResult:
    """Train ``model`` in place on ``device``, where it stays, and leave it in the best state seen, in evaluation mode.

    The best state, the start among them, is the one of least calibrated loss on the guard's images (see
    ``CurvePoint``). The guard is ``held_back`` where it is given, else ``hold_back`` takes it from ``split``, else,
    where a class has one image or nothing is to be held back, it is the training images. ``on_step(step, steps,
    loss)`` is called after every step, steps counted from 1. ``teacher``, of the same classes, adds distillation: the
    Kullback-Leibler divergence of softened answers times the squared temperature (Hinton et al. 2015). ``begin`` is
    another state of the model to train from, such as ``ClosedForm.trainable``; the model's own stays the start that
    is never undercut.

    ``memory_limit`` keeps what is taken, in bytes above what was taken before the first step, below a limit, by what
    ``plan_memory`` finds to cost least; the result's ``memory`` says what that was and what was measured. The plan
    goes by counts alone, never by what is measured, so that the same seed and limit give the same model. A limit that
    nothing fits in raises TrainingError before any step, naming the smallest that can be reached.

    ``answers`` stand in place of a teacher: what it answers to each image of ``split``, logits ``[n, classes]``. It is
    then not asked about each shifted view in each step, which takes longer than all else where the model is small.
    ``split`` must be what is trained on: the guard's images are in ``held_back``, or nothing is held back.

    A KeyboardInterrupt ends training, not the program: the result says ``stopped``. A non-finite loss raises
    TrainingError. Whatever happens, an error of ``on_step`` too, the model is left in its best state. The same seed
    gives the same model, bit for bit, on the CPU; the global random state is left as it was. Folded batch norms (see
    ``calibration.is_folded``), and any where a batch is a single image, stay frozen whatever the recipe says.
    """
    _check(model, split, preprocessing, teacher, answers, torch.device(device))
    if memory_limit is not None and memory_limit < 1:
        raise TrainingError(f"the limit of memory is {memory_limit}; expected a number of bytes above 0, or None")
    train, guard = (split, held_back) if held_back is not None else hold_back(split, recipe.hold_back, recipe.seed)
    if answers is not None and len(answers) != len(train.labels):
        raise TrainingError(
            f"there are {len(answers)} answers of a teacher and {len(train.labels)} images to train on; expected an "
            "answer for each: give the guard's images as held_back"
        )
    optimiser = optimiser_name(model, recipe)
    precision = resolve_precision(recipe, torch.device(device))
    size = min(recipe.batch_size, len(train.labels))
    run = _Run(
        lesson=Lesson(model, teacher, preprocessing, recipe, precision),
        plan=MemoryPlan(size, taught_at_once=_taught_at_once(teacher, size, torch.device(device))),
        train=train if memory_limit is not None else _on(train, torch.device(device)),
        guard=train if guard is None else guard,
        guarded=guard is not None,
        answers=None if answers is None else answers.to(device),
        optimiser=optimiser,
        learning_rate=recipe.learning_rate or default_rate(optimiser, recipe.steps),
        begin=begin,
    )
    started = perf_counter()
    stopped = False
    try:
        with _surroundings(run.lesson, torch.device(device)):
            run.prepare(memory_limit)
            compact = returned_at_once() if run.plan.compact else nullcontext()
            with arranged(run.plan, model, run.layers), compact:
                run.go(on_step)
    except KeyboardInterrupt:
        stopped = True
    finally:
        run.restore()
        lay_out(model, fast=False)
        model.eval()
    return run.result(stopped, perf_counter() - started)


def judge(
    model: nn.Module, split: Split, preprocessing: Preprocessing, step: int, *, batch_size: int | None = None
) -> CurvePoint:
    """How good a model is on a split, after ``step`` steps."""
    answers = logits(model, split.images, preprocessing, batch_size=batch_size)
    losses = [float(functional.cross_entropy(answers / heat, split.labels)) for heat in HEATS]
    accuracy = float((answers.argmax(1) == split.labels).double().mean())
    finite = all(math.isfinite(loss) for loss in losses)
    return CurvePoint(step, accuracy, losses[HEATS.index(1)], min(losses) if finite else math.inf)


@dataclass(eq=False)
class _Run:
    """A fine-tuning under way: what it works on, what it has seen, and the best state so far."""

    lesson: Lesson
    plan: MemoryPlan
    train: Split
    guard: Split
    guarded: bool
    optimiser: Literal["sgd", "adamw"]
    learning_rate: float
    begin: Mapping[str, Tensor] | None
    answers: Tensor | None = None
    layers: list[Piece] = field(default_factory=list)
    moved: frozenset[str] = frozenset()
    watch: Watch | None = None
    counts: bool = False
    losses: list[float] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    best_step: int = 0
    least: float = math.inf
    best_state: dict[str, Tensor] = field(default_factory=dict)
    copying: bool = False

    @property
    def model(self) -> nn.Module:
        return self.lesson.model

    @property
    def recipe(self) -> Recipe:
        return self.lesson.recipe

    def prepare(self, limit: int | None) -> None:
        """Plan how to stay below a limit of memory, and begin to measure."""
        if limit is None or self.recipe.steps == 0:
            return
        size, moments = self.plan.batch_size, MOMENTS[self.optimiser]
        self.moved = _moved(self.model, self.begin)
        needs = Needs(self.lesson, self.train.images, size, moments, self.moved)
        self.plan, self.layers = plan_memory(needs, limit), needs.layers
        needs.warm_up(self.plan)
        self.watch = Watch(device_of(self.model))

    def go(self, on_step: OnStep | None) -> None:
        if self.recipe.steps == 0:
            return
        self.keep(0)
        self.least = self.judge(0)
        self.tidy()
        if self.begin is not None:
            _copy(self.model, self.begin)
        every = self.plan.norms_frozen or freezes_batch_norm(self.recipe, self.plan.batch_size)
        self.counts = not every
        with frozen_batch_norm(self.model, lambda norm: every or is_folded(norm)):
            self.train_steps(on_step)

    def train_steps(self, on_step: OnStep | None) -> None:
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed)
        order = batches(len(self.train.labels), self.plan.batch_size, generator)
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
        images = self.train.images[indices]
        if self.recipe.augmentation == "light":
            images = shift_and_flip(images, generator, flip=self.recipe.flip)
        labels = self.train.labels[indices].to(device_of(self.model))
        given = self.answers
        target = teach(self.lesson, images, self.plan.taught_at_once) if given is None else given[indices]
        self.tidy()
        self.model.train()
        loss = learn(self.lesson, images, labels, target, self.plan.parts)
        self.tidy()
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss)  # a device is waited for once a step, when all of it is under way

    def judge(self, step: int) -> float:
        """Judge the model on the guard's images, in float32; the calibrated loss."""
        size = min(self.plan.judged_at_once, at_once(device_of(self.model)))
        point = judge(self.model, self.guard, self.lesson.preprocessing, step, batch_size=size)
        self.curve.append(point)
        return point.calibrated

    def keep_if_best(self, step: int) -> None:
        """Judge the model, its batch norms counted again: running averages lag behind by as many steps as are few."""
        if self.counts:
            reestimate_batch_norm(
                self.model,
                self.train.images,
                self.lesson.preprocessing,
                batch_size=min(COUNTED, self.plan.judged_at_once),
                max_images=256,
                seed=self.recipe.seed,
            )
        calibrated = self.judge(step)
        if calibrated < self.least:
            self.least = calibrated
            self.keep(step)
        self.tidy()

    def tidy(self) -> None:
        """Under a limit, give back what the phase before took: its blocks would stay beside those of the next."""
        if self.watch is not None:
            give_back_unused()

    def keep(self, step: int) -> None:
        """Copy the model's state, over the one before: two at once would be too many where memory is short."""
        self.best_step, self.copying = step, True
        still = {name for layer in self.layers if layer.name in self.plan.frozen for name in layer.parameters}
        unchanged = still - self.moved
        for name, tensor in self.model.state_dict().items():
            if name in self.best_state:
                self.best_state[name].copy_(tensor)
            elif name not in unchanged:
                self.best_state[name] = tensor.detach().clone()
        self.copying = False

    def restore(self) -> None:
        """Put the best state back; interrupted while it was copied, the model itself is in it still."""
        if not self.copying:
            _copy(self.model, self.best_state)

    def result(self, stopped: bool, seconds: float) -> TrainingResult:
        peak = None if self.watch is None else self.watch.stop()
        return TrainingResult(
            losses=tuple(self.losses),
            curve=tuple(self.curve),
            best_step=self.best_step,
            guard="held-back" if self.guarded else "training",
            stopped=stopped,
            seconds=seconds,
            images_seen=len(self.losses) * self.plan.batch_size,
            optimiser=self.optimiser,
            learning_rate=self.learning_rate,
            precision=self.lesson.precision,
            memory=remember(self.plan, peak),
        )


def _taught_at_once(teacher: nn.Module | None, size: int, device: torch.device) -> int:
    """Images that a teacher answers at a time: fewer where grouped convolutions make it wait for memory on a CPU."""
    grouped = teacher is not None and any(
        isinstance(module, nn.Conv2d) and module.groups > 1 for module in teacher.modules()
    )
    return min(size, at_once(device)) if grouped and device.type == "cpu" else size


def _on(split: Split, device: torch.device) -> Split:
    """The images where they are trained on, moved there once."""
    return Split(split.images.to(device), split.labels.to(device))


@torch.no_grad()
def _copy(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        if name in state:
            tensor.copy_(state[name])


def _moved(model: nn.Module, begin: Mapping[str, Tensor] | None) -> frozenset[str]:
    """The tensors of the model's state that another one changes."""
    given = {} if begin is None else begin
    own = model.state_dict().items()
    return frozenset(name for name, value in own if name in given and not torch.equal(value, given[name].to(value)))


@contextmanager
def _surroundings(lesson: Lesson, device: torch.device) -> Iterator[None]:
    """The model on its device in the layout that is fastest there, and a random state of its own."""
    with ExitStack() as stack:
        cuda = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.default_generator.manual_seed(lesson.recipe.seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(lesson.recipe.seed)
        lesson.model.to(device)
        if lesson.teacher is not None:
            lesson.teacher.to(device).eval()
        lay_out(lesson.model)
        yield


def _check(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    teacher: nn.Module | None,
    answers: Tensor | None,
    device: torch.device,
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
    if teacher is not None and answers is not None:
        raise TrainingError("a teacher and a teacher's answers were both given; expected one of them")
    if teacher is not None:
        answers = logits(teacher, split.images[:1], preprocessing, device=device)
    if answers is not None:
        taught = answers.shape[1]
        if taught != classes:
            raise TrainingError(
                f"the teacher answers {taught} classes and the model {classes}; expected a teacher of the same task"
            )
