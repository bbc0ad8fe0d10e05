"""The one fine-tuning loop: a recipe, a guard on held-back images, and never an end below the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional

from kinprune.calibration import batch_norms, frozen_batch_norm, is_folded
from kinprune.errors import TaskError, TrainingError
from kinprune.evaluation import device_of, evaluate, logits
from kinprune.preprocessing import Preprocessing, normalise
from kinprune.tasks import Split

Optimiser = Literal["auto", "sgd", "adamw"]
BatchNormMode = Literal["batch", "frozen"]
Augmentation = Literal["none", "light"]
Precision = Literal["auto", "float32", "bfloat16"]
OnStep = Callable[[int, int, float], None]

LEARNING_RATES = {"sgd": 0.01, "adamw": 1e-4}
"""Defaults. From a closed-form start, SGD at .03 and AdamW at 3e-4 were seen to destroy what pruning had left."""
SHIFT = 0.125
"""The largest random shift, as a share of the image's side: the usual 4 pixels of 32."""


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; a value that makes no sense is refused with a TrainingError when the recipe is made.

    - ``steps`` mini-batches of ``batch_size`` images, drawn without replacement in each pass over the data;
    - ``optimiser``: *auto* is SGD (``momentum``, Nesterov) for a model with batch norm, AdamW for others;
      ``learning_rate`` None is .01 for SGD and 1e-4 for AdamW; it rises linearly over the first ``warmup`` share of
      the steps and falls to 0 on a half cosine; ``weight_decay`` spares biases, norms and embeddings;
    - ``layer_decay`` multiplies the rate once more for each block away from the head (1 is off);
    - ``batch_norm`` *batch* trains on the batches' own statistics, *frozen* on the running ones, which then stay;
    - ``augmentation`` *light* shifts each image at random by up to an eighth of its side, reflecting at the borders,
      and mirrors it half of the time where ``flip`` is set (off: digits, letters and signs are not mirror-invariant);
    - ``precision`` *auto* is bfloat16 where the device multiplies it natively, else float32;
    - ``clip_norm`` is the largest gradient norm, None for no limit;
    - ``distillation`` is the share of a teacher, where one is given, in the loss, at ``distillation_temperature``;
    - ``hold_back`` is the share of each class kept from training to judge the model by, at the start and at
      ``evaluations`` evenly spaced steps, the last one among them.
    """

    steps: int = 60
    batch_size: int = 64
    optimiser: Optimiser = "auto"
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.1
    layer_decay: float = 1.0
    batch_norm: BatchNormMode = "frozen"
    label_smoothing: float = 0.0
    augmentation: Augmentation = "light"
    flip: bool = False
    precision: Precision = "auto"
    clip_norm: float | None = 1.0
    distillation: float = 0.5
    distillation_temperature: float = 2.0
    hold_back: float = 0.1
    evaluations: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 0), ("batch_size", 1), ("evaluations", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise TrainingError(f"the recipe's {name} is {value!r}; expected a whole number of at least {low}")
        for name, text, holds in _RANGES:
            value = getattr(self, name)
            if value is None and name in ("learning_rate", "clip_norm"):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not holds(value):
                raise TrainingError(f"the recipe's {name} is {value!r}; expected a number {text}")
        for name, choices in (
            ("optimiser", get_args(Optimiser)),
            ("batch_norm", get_args(BatchNormMode)),
            ("augmentation", get_args(Augmentation)),
            ("precision", get_args(Precision)),
            ("flip", (True, False)),
        ):
            if getattr(self, name) not in choices:
                raise TrainingError(
                    f"the recipe's {name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, choices))}"
                )


_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("learning_rate", "above 0, or None for the optimiser's default", lambda v: v > 0),
    ("clip_norm", "above 0, or None for no limit", lambda v: v > 0),
    ("weight_decay", "of at least 0", lambda v: v >= 0),
    ("momentum", "above 0 and below 1", lambda v: 0 < v < 1),
    ("label_smoothing", "from 0 to below 1", lambda v: 0 <= v < 1),
    ("hold_back", "from 0 to below 1, 0 to hold nothing back", lambda v: 0 <= v < 1),
    ("warmup", "from 0 to 1", lambda v: 0 <= v <= 1),
    ("distillation", "from 0 to 1", lambda v: 0 <= v <= 1),
    ("distillation_temperature", "above 0", lambda v: v > 0),
    ("layer_decay", "above 0, at most 1", lambda v: 0 < v <= 1),
)


@dataclass(frozen=True)
class CurvePoint:
    """The model judged after ``step`` steps on the guard's images."""

    step: int
    accuracy: float
    loss: float


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


def hold_back(split: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """A split without ``fraction`` of each class's images, at least one, and those images.

    Drawn with ``seed``. (split, None) where ``fraction`` is 0 or a class has fewer than two images.
    Solve a closed-form head on the first part: a head that has seen the second one makes it a poor judge.
    """
    counts = torch.bincount(split.labels)
    if fraction == 0 or int(counts[counts > 0].min()) < 2:
        return split, None
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(split.labels), dtype=torch.bool)
    for label in counts.nonzero().flatten().tolist():
        members = order[split.labels[order] == label]
        held[members[: min(len(members) - 1, max(1, round(fraction * len(members))))]] = True
    return Split(split.images[~held], split.labels[~held]), Split(split.images[held], split.labels[held])


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
) -> TrainingResult:
    """Train ``model`` in place on ``device``, where it stays, and leave it in the best state seen, in evaluation mode.

    The best state, the start among them, has the highest accuracy on the guard's images, then the lowest loss; ties
    go to the earlier. The guard is ``held_back`` where it is given, else ``hold_back`` takes it from ``split``, else,
    where a class has one image, the training images' loss alone decides. ``on_step(step, steps, loss)`` is called
    after every step, steps counted from 1. ``teacher``, of the same classes, adds distillation: the Kullback-Leibler
    divergence of softened answers times the squared temperature (Hinton et al. 2015).

    A KeyboardInterrupt ends training, not the program: the result says ``stopped``. A non-finite loss raises
    TrainingError. Whatever happens, an error of ``on_step`` too, the model is left in its best state. The same seed
    gives the same model, bit for bit, on the CPU; the global random state is left as it was. Folded batch norms (see
    ``calibration.is_folded``), and any where a batch is a single image, stay frozen whatever the recipe says.
    """
    _check(model, split, preprocessing, teacher, torch.device(device))
    train, guard = (split, held_back) if held_back is not None else hold_back(split, recipe.hold_back, recipe.seed)
    optimiser = _optimiser_name(model, recipe)
    run = _Run(
        model=model,
        train=train,
        guard=guard or train,
        judged_by_accuracy=guard is not None,
        preprocessing=preprocessing,
        recipe=recipe,
        optimiser=optimiser,
        learning_rate=recipe.learning_rate or LEARNING_RATES[optimiser],
        precision=_precision(recipe, torch.device(device)),
        teacher=teacher,
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
        model.eval()
    return TrainingResult(
        losses=tuple(run.losses),
        curve=tuple(run.curve),
        best_step=run.best_step,
        guard="training" if guard is None else "held-back",
        stopped=stopped,
        seconds=perf_counter() - started,
        images_seen=len(run.losses) * run.batch_size,
        optimiser=optimiser,
        learning_rate=run.learning_rate,
        precision=run.precision,
    )


class _Run:
    """A fine-tuning under way: what it works on, what it has seen, and the best state so far."""

    def __init__(
        self,
        *,
        model: nn.Module,
        train: Split,
        guard: Split,
        judged_by_accuracy: bool,
        preprocessing: Preprocessing,
        recipe: Recipe,
        optimiser: str,
        learning_rate: float,
        precision: str,
        teacher: nn.Module | None,
    ) -> None:
        self.model = model
        self.train = train
        self.guard = guard
        self.judged_by_accuracy = judged_by_accuracy
        self.preprocessing = preprocessing
        self.recipe = recipe
        self.optimiser = optimiser
        self.learning_rate = learning_rate
        self.precision = precision
        self.teacher = teacher
        self.batch_size = min(recipe.batch_size, len(train.labels))
        self.losses: list[float] = []
        self.curve: list[CurvePoint] = []
        self.best_step = 0
        self.best_score = (-1.0, -math.inf)
        self.best_state: dict[str, Tensor] = {}

    def go(self, on_step: OnStep | None) -> None:
        recipe = self.recipe
        if recipe.steps == 0:
            return
        self.keep(0)
        self.judge(0)
        generator = torch.Generator().manual_seed(recipe.seed)
        batches = _batches(len(self.train.labels), self.batch_size, generator)
        optimiser = _optimiser(self.model, recipe, self.optimiser, self.learning_rate)
        checks = {round(i * recipe.steps / recipe.evaluations) for i in range(1, recipe.evaluations + 1)}
        for step in range(1, recipe.steps + 1):
            rate = self.learning_rate * schedule(step, recipe.steps, recipe.warmup)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["lr_scale"]
            loss = self.step(next(batches), optimiser, generator)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} at step {step} of {recipe.steps} (learning rate {rate:g}); expected a "
                    "finite number: lower the recipe's learning_rate, or set its precision to 'float32'. "
                    f"The model was put back to its best state, that of step {self.best_step}"
                )
            self.losses.append(loss)
            if step in checks:
                self.judge(step)
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
        return float(loss)

    def judge(self, step: int) -> None:
        """Judge the model on the guard's images in float32, and keep its state where it is the best so far."""
        result = evaluate(self.model, self.guard, self.preprocessing)
        self.curve.append(CurvePoint(step, result.accuracy, result.loss))
        score = (result.accuracy if self.judged_by_accuracy else 0.0, -result.loss)
        if math.isfinite(result.loss) and score > self.best_score:
            self.best_score = score
            self.keep(step)

    def keep(self, step: int) -> None:
        self.best_step = step
        self.best_state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, tensor in self.model.state_dict().items():
            if name in self.best_state:
                tensor.copy_(self.best_state[name])


@contextmanager
def _surroundings(run: _Run, device: torch.device) -> Iterator[None]:
    """The model on its device in the layout that is fastest there, frozen norms, and a random state of its own."""
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
        # Measured on the CPU: a third to a half off a step of a CNN; a ViT's one convolution gains nothing.
        if sum(isinstance(module, nn.Conv2d) for module in run.model.modules()) > 1:
            run.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            stack.callback(run.model.to, memory_format=torch.contiguous_format)
        every = run.recipe.batch_norm == "frozen" or run.batch_size < 2
        stack.enter_context(frozen_batch_norm(run.model, lambda norm: every or is_folded(norm)))
        yield


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at ``step`` (from 1): a linear rise over ``warmup * steps``, a half cosine to 0."""
    rising = round(warmup * steps)
    if step <= rising:
        return step / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising - 1) / (steps - rising)))


def shift_and_flip(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Each image ``[n, c, h, w]`` moved by its own random offset, reflected at its borders; mirrored half the time.

    Offsets are uniform whole pixels up to an eighth of each side; images of a single row or column stay.
    """
    count, _, height, width = images.shape
    rows, columns = (_reflected(count, side, generator) for side in (height, width))
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    index = torch.arange(count).view(-1, 1, 1)
    # Indexing [n, :, h, w] puts the channels last.
    return images[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _reflected(count: int, side: int, generator: torch.Generator) -> Tensor:
    """For each image, the source index of every pixel along a side: ``[count, side]``."""
    reach = int(SHIFT * side)
    offsets = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
    indices = (torch.arange(side) + offsets).abs()
    return (side - 1) - ((side - 1) - indices).abs()


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of full batches, for ever; what is left of a pass is dropped, and drawn anew in the next."""
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def _loss(outputs: Tensor, labels: Tensor, target: Tensor | None, recipe: Recipe) -> Tensor:
    loss = functional.cross_entropy(outputs, labels, label_smoothing=recipe.label_smoothing)
    if target is None:
        return loss
    heat = recipe.distillation_temperature
    own, wanted = (outputs / heat).log_softmax(1), (target / heat).log_softmax(1)
    divergence = functional.kl_div(own, wanted, reduction="batchmean", log_target=True)
    return (1 - recipe.distillation) * loss + recipe.distillation * heat**2 * divergence


def _optimiser(model: nn.Module, recipe: Recipe, name: str, learning_rate: float) -> torch.optim.Optimizer:
    spared: Any = getattr(model, "no_weight_decay", set)
    groups = param_groups_layer_decay(
        model,
        weight_decay=recipe.weight_decay,
        no_weight_decay_list=tuple(spared()),
        layer_decay=recipe.layer_decay,
    )
    if name == "sgd":
        return torch.optim.SGD(groups, learning_rate, momentum=recipe.momentum, nesterov=True)
    return torch.optim.AdamW(groups, learning_rate)


def _optimiser_name(model: nn.Module, recipe: Recipe) -> Literal["sgd", "adamw"]:
    if recipe.optimiser == "auto":
        return "sgd" if batch_norms(model) else "adamw"
    return recipe.optimiser


def _precision(recipe: Recipe, device: torch.device) -> Literal["float32", "bfloat16"]:
    if recipe.precision != "auto":
        return recipe.precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # Without these instructions bfloat16 is emulated, many times slower than float32.
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"


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
