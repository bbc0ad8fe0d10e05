"""How images become a model's input: size, crop, interpolation, mean and standard deviation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

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


def normalise(images: Tensor, preprocessing: Preprocessing, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images ``uint8 [n, 3, h, w]`` to the model's input ``[n, 3, h, w]`` on the images' device."""
    mean = torch.tensor(preprocessing.mean, dtype=dtype, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, dtype=dtype, device=images.device).view(1, 3, 1, 1)
    return (images.to(dtype) / 255 - mean) / std
