"""How images become a model's input: size, crop, interpolation, mean and standard deviation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from kinprune.errors import BackboneError

if TYPE_CHECKING:  # an exported model is used where there is no PyTorch, and says its preprocessing too
    import torch
    from torch import Tensor

Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone expects of its images.

    ``image_size`` is (height, width) in pixels; ``mean`` and ``std`` are per channel, for pixels in [0, 1];
    ``crop_pct`` is the share of the resized image's side that the centre crop keeps.
    """

    image_size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def resolved(*, image_size: Any, mean: Any, std: Any, interpolation: Any, crop_pct: Any) -> Preprocessing:
    """Preprocessing of values from anywhere. Raises BackboneError for one that is no preprocessing, naming it."""
    return Preprocessing(
        image_size=_size(image_size),
        mean=_three("mean", mean),
        std=_three("std", std, positive=True),
        interpolation=_interpolation(interpolation),
        crop_pct=_crop_pct(crop_pct),
    )


def normalise(images: Tensor, preprocessing: Preprocessing, dtype: torch.dtype | None = None) -> Tensor:
    """Images ``uint8 [n, 3, h, w]`` to the model's input ``[n, 3, h, w]`` on the images' device; float32 by default."""
    import torch

    dtype = dtype or torch.float32
    mean = torch.tensor(preprocessing.mean, dtype=dtype, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, dtype=dtype, device=images.device).view(1, 3, 1, 1)
    return (images.to(dtype) / 255 - mean) / std


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
