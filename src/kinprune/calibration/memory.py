"""How many images a model can take at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kinprune.evaluation import device_of, eval_mode
from kinprune.preprocessing import Preprocessing, normalise


@torch.no_grad()
def images_in_memory(model: nn.Module, image: Tensor, preprocessing: Preprocessing, memory_mb: int) -> int:
    """How many images' activations fit, counting three float32 tensors of the widest layer; at least 2."""
    largest = [0]

    def measure(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            largest.append(output.numel())

    handles = [module.register_forward_hook(measure) for module in model.modules()]
    try:
        with eval_mode(model):
            model(normalise(image.to(device_of(model)), preprocessing))
    finally:
        for handle in handles:
            handle.remove()
    return max(2, memory_mb * 2**20 // (3 * 4 * max(1, *largest)))
