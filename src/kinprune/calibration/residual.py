"""Where a layer's output goes: the residual stream it is added to, and what scales it on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers.layer_scale import LayerScale
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Shortcut = tuple[str, Literal["input", "output"]]


@dataclass(frozen=True)
class ReconstructionLayer:
    """A layer to solve again, and how its output enters the residual stream.

    ``shortcut`` is where the tensor it is added to can be seen: at a module's input or output. ``through`` is a module
    that tensor goes through first (a ResNet's ``downsample``), ``scale`` a batch norm or layer scale between the
    layer's output and the addition. ``outputs`` are the dense layer's output channels that the pruned one still has;
    None where it has all.
    """

    name: str
    shortcut: Shortcut | None = None
    through: str | None = None
    scale: str | None = None
    outputs: tuple[int, ...] | None = None


def describe_layers(model: nn.Module, layers: Sequence[str | ReconstructionLayer]) -> tuple[ReconstructionLayer, ...]:
    """Complete plain names with the residual stream they end in, for timm's ResNet, MobileNet and ViT blocks.

    A name in another kind of block, or in a block with channel attention after the layer, is matched on its own output
    alone; what is a ``ReconstructionLayer`` already is kept.
    """
    return tuple(_describe(model, layer) if isinstance(layer, str) else layer for layer in layers)


def _describe(model: nn.Module, name: str) -> ReconstructionLayer:
    for cut in range(1, 3):
        path, _, child = _split(name, cut)
        block = _submodule(model, path)
        if isinstance(block, BasicBlock | Bottleneck):
            return _in_resnet(block, name, path, child)
        if isinstance(block, InvertedResidual | DepthwiseSeparableConv):
            return _in_mobilenet(block, name, path, child)
        if isinstance(block, Block):
            return _in_transformer(block, name, path, child)
    return ReconstructionLayer(name)


def _in_resnet(block: BasicBlock | Bottleneck, name: str, path: str, child: str) -> ReconstructionLayer:
    last = "conv2" if isinstance(block, BasicBlock) else "conv3"
    if child != last or block.se is not None:
        return ReconstructionLayer(name)
    through = None if block.downsample is None else f"{path}.downsample"
    return ReconstructionLayer(name, (f"{path}.conv1", "input"), through, f"{path}.bn{last[-1]}")


def _in_mobilenet(
    block: InvertedResidual | DepthwiseSeparableConv, name: str, path: str, child: str
) -> ReconstructionLayer:
    first, last, norm = (
        ("conv_pw", "conv_pwl", "bn3") if isinstance(block, InvertedResidual) else ("conv_dw", "conv_pw", "bn2")
    )
    if child != last:
        return ReconstructionLayer(name)
    shortcut: Shortcut | None = (f"{path}.{first}", "input") if block.has_skip else None
    return ReconstructionLayer(name, shortcut, scale=f"{path}.{norm}")


def _in_transformer(block: Block, name: str, path: str, child: str) -> ReconstructionLayer:
    index = {"attn.proj": 1, "mlp.fc2": 2}.get(child)
    if index is None:
        return ReconstructionLayer(name)
    scale = f"{path}.ls{index}" if isinstance(getattr(block, f"ls{index}"), LayerScale) else None
    return ReconstructionLayer(name, (f"{path}.norm{index}", "input"), scale=scale)


def _split(name: str, cut: int) -> tuple[str, str, str]:
    parts = name.split(".")
    return ".".join(parts[:-cut]), ".", ".".join(parts[-cut:])


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path) if path else None
    except AttributeError:
        return None


def scaling(model: nn.Module, name: str | None) -> nn.Module | None:
    """The module between a layer and the addition, where it is one whose effect on a channel is a * x + b."""
    module = None if name is None else model.get_submodule(name)
    if isinstance(module, _BatchNorm):
        active = isinstance(getattr(module, "act", nn.Identity()), nn.Identity)
        return module if active and module.running_mean is not None else None
    return module if isinstance(module, LayerScale) else None


def affine(module: nn.Module | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """What ``module`` multiplies a channel by and then adds, each ``[channels]``, as ``like``'s last dimension.

    A batch norm in evaluation mode: gamma / sqrt(variance + eps) and beta - mean * that; a layer scale: gamma and 0.
    """
    ones, zeros = like.new_ones(like.shape[-1]), like.new_zeros(like.shape[-1])
    if isinstance(module, LayerScale):
        return module.gamma.to(like), zeros
    if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
        weight = ones if module.weight is None else module.weight.to(like)
        multiplier = weight / torch.sqrt(module.running_var.to(like) + module.eps)
        bias = zeros if module.bias is None else module.bias.to(like)
        return multiplier, bias - module.running_mean.to(like) * multiplier
    return ones, zeros
