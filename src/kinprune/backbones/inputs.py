"""Which images a backbone takes: its preprocessing, and the sizes it can be used at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from kinprune.backbones.checkpoint import Hints
from kinprune.errors import BackboneError
from kinprune.preprocessing import Preprocessing, resolved

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
    return resolved(**values)


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
