"""How to fine-tune: the values of a recipe, and what its defaults become for a model on a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay  # type: ignore[attr-defined]
from torch import nn

from kinprune.calibration import batch_norms
from kinprune.errors import TrainingError

Optimiser = Literal["auto", "sgd", "adamw"]
BatchNormMode = Literal["auto", "batch", "frozen"]
Augmentation = Literal["none", "light"]
Precision = Literal["auto", "float32", "bfloat16"]

LEARNING_RATES = {"sgd": 0.03, "adamw": 1e-4}
"""Defaults for ``MANY_STEPS``, SGD's for fewer too."""
MANY_STEPS, LEAST_SHARE = 60, 0.3
MOST_RATES = {"sgd": 0.1, "adamw": 5e-4}
"""AdamW's first steps are as large as its rate whatever the gradient is, and a ViT needs some thirty steps to make
good what they break: with fewer steps the rate is smaller, down to this share. With more, either's grows with their
root, up to these."""

MOMENTS = {"sgd": 1, "adamw": 2}
"""Numbers that an optimiser keeps for each parameter."""

LEAST_BATCH = 16
"""Images below which a mini-batch's own statistics are too noisy to train on."""


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; a value that makes no sense is refused with a TrainingError when the recipe is made.

    - ``steps`` mini-batches of ``batch_size`` images, drawn without replacement in each pass over the data;
    - ``optimiser``: *auto* is SGD (``momentum``, Nesterov) for a model with batch norm, AdamW for others;
      ``learning_rate`` None goes by optimiser and steps (see ``default_rate``); it rises linearly over
      the first ``warmup`` share of the steps and falls to 0 on a half cosine; ``weight_decay`` spares biases, norms
      and embeddings;
    - ``layer_decay`` multiplies the rate once more for each block away from the head (1 is off);
    - ``batch_norm`` *batch* trains on the batches' own statistics, *frozen* on the running ones, which then stay;
      *auto* is batch where a mini-batch has at least 16 images (pruned ResNet-18 and MobileNetV2 hardly train
      frozen), else frozen;
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
    warmup: float = 0.3
    layer_decay: float = 1.0
    batch_norm: BatchNormMode = "auto"
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


def freezes_batch_norm(recipe: Recipe, batch_size: int) -> bool:
    """Whether batch norms keep their running statistics when ``batch_size`` images are in a mini-batch."""
    if batch_size < 2:
        return True
    return recipe.batch_norm == "frozen" or (recipe.batch_norm == "auto" and batch_size < LEAST_BATCH)


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at ``step`` (from 1): a linear rise over the warm-up, then a half cosine to 0."""
    rising = round(warmup * steps)
    if step <= rising:
        return step / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising - 1) / (steps - rising)))


def make_optimiser(model: nn.Module, recipe: Recipe, name: str, learning_rate: float) -> torch.optim.Optimizer:
    """The optimiser ``name`` over the model's trainable parameters, decayed and slowed by depth as the recipe says."""
    spared: Any = getattr(model, "no_weight_decay", set)
    decay, bare = recipe.weight_decay, tuple(spared())
    groups = (
        param_groups_weight_decay(model, decay, no_weight_decay_list=bare)
        if recipe.layer_decay == 1
        else param_groups_layer_decay(model, decay, no_weight_decay_list=bare, layer_decay=recipe.layer_decay)
    )
    if name == "sgd":
        return torch.optim.SGD(groups, learning_rate, momentum=recipe.momentum, nesterov=True)
    return torch.optim.AdamW(groups, learning_rate)


def optimiser_name(model: nn.Module, recipe: Recipe) -> Literal["sgd", "adamw"]:
    """What the recipe's optimiser is for this model: ``auto`` is SGD with batch norm, AdamW without."""
    if recipe.optimiser == "auto":
        return "sgd" if batch_norms(model) else "adamw"
    return recipe.optimiser


def default_rate(optimiser: Literal["sgd", "adamw"], steps: int) -> float:
    """The highest learning rate where the recipe names none."""
    rate, share = LEARNING_RATES[optimiser], steps / MANY_STEPS
    if share >= 1:
        return min(rate * math.sqrt(share), MOST_RATES[optimiser])
    return rate if optimiser == "sgd" else rate * max(LEAST_SHARE, share)


def resolve_precision(recipe: Recipe, device: torch.device) -> Literal["float32", "bfloat16"]:
    """What the recipe's precision is on this device: ``auto`` is bfloat16 where it is multiplied natively."""
    if recipe.precision != "auto":
        return recipe.precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # Without these instructions bfloat16 is emulated, many times slower than float32.
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"
