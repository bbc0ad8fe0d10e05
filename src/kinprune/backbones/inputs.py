"""Which images a backbone takes: its preprocessing, and the sizes it can be used at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast, get_args

from torch import nn

from kinprune.backbones.checkpoint import Hints
from kinprune.errors import BackboneError
from kinprune.preprocessing import Interpolation, Preprocessing

_SMALLEST = 32  # pixels: timm's CNNs halve their input five times


def resolve_preprocessing(
    config: Mapping[str, Any],
    hints: Hints,
    *,
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> Preprocessing:
    """Preprocessing by argument, else by the weights file's ``hints``, else by timm's ``config`` of the model.

    Raises BackboneError for a value that is no preprocessing, naming it.
    """
    own = dict(config)
    if own.get("input_size"):
        channels, *own["image_size"] = own["input_size"]
        if channels != 3:
            raise BackboneError(f"The model takes images of {channels} channels, expected 3: use another backbone.")
    given = {"image_size": image_size, "mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}
    values = asdict(Preprocessing())
    for source in (own, asdict(hints), given):
        values.update({key: source[key] for key in given if source.get(key) is not None})
    return Preprocessing(
        image_size=_size(values["image_size"]),
        mean=_three("mean", values["mean"]),
        std=_three("std", values["std"], positive=True),
        interpolation=_interpolation(values["interpolation"]),
        crop_pct=_crop_pct(values["crop_pct"]),
    )


def check_least_size(image_size: tuple[int, int]) -> None:
    """Raise BackboneError for images smaller than a timm CNN can reduce."""
    if min(image_size) < _SMALLEST:
        height, width = image_size
        raise BackboneError(
            f"The image size {height}x{width} is too small, expected at least {_SMALLEST} pixels a side: "
            f"use --image-size {_SMALLEST} or more."
        )


def check_patches(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Raise BackboneError, with the nearest valid sizes, if patches of a transformer do not tile ``image_size``."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple) or all(side % p == 0 for side, p in zip(image_size, patch, strict=True)):
        return
    below = [max(p, side // p * p) for side, p in zip(image_size, patch, strict=True)]
    above = [-(-side // p) * p for side, p in zip(image_size, patch, strict=True)]
    valid = " or ".join(dict.fromkeys(f"{height}x{width}" for height, width in (below, above)))
    raise BackboneError(
        f"The image size {image_size[0]}x{image_size[1]} is not a whole number of patches of {patch[0]}x{patch[1]} "
        f"pixels: use {valid}."
    )


def _size(value: Any) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(sides) != 2 or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides):
        raise BackboneError(f"The image size is {value!r}, expected pixels, such as 224 or (height, width).")
    return sides


def _three(name: str, value: Any, *, positive: bool = False) -> tuple[float, float, float]:
    numbers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    valid = len(numbers) == 3 and all(
        isinstance(number, int | float) and math.isfinite(number) and (number > 0 or not positive) for number in numbers
    )
    if not valid:
        kind = "positive numbers" if positive else "numbers"
        raise BackboneError(f"{name} is {value!r}, expected three {kind}, one a channel, for pixels in [0, 1].")
    first, second, third = map(float, numbers)
    return first, second, third


def _interpolation(value: Any) -> Interpolation:
    known = get_args(Interpolation)
    if value not in known:
        raise BackboneError(f"The interpolation is {value!r}, expected one of {', '.join(known)}.")
    return cast(Interpolation, value)


def _crop_pct(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise BackboneError(f"crop_pct is {value!r}, expected the share of a side that is kept, above 0 and up to 1.")
    return float(value)
