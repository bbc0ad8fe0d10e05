"""torch-pruning as its own examples use it on timm models: what Kinprune is measured against."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from timm.layers.config import set_fused_attn, use_fused_attn
from torch import Tensor, nn

LAYERS = ("qkv", "qkv_proj")


@contextmanager
def plain_attention() -> Iterator[None]:
    """Models built inside use attention in single operations, which torch-pruning can trace, as in its examples."""
    fused = use_fused_attn()
    set_fused_attn(False)
    try:
        yield
    finally:
        set_fused_attn(fused)


def build_pruner(
    model: nn.Module, image: Tensor, importance: Callable[..., Any], *, ratio: float, whole_heads: bool = False
) -> Any:
    """A pruner that takes the same share of every layer but the classifier; ``whole_heads`` instead of head widths."""
    import torch_pruning

    classifier: Any = model
    classifier = classifier.get_classifier()
    ignored = [*classifier] if isinstance(classifier, tuple) else [classifier]
    heads = {layer: module.num_heads for module, layer in _attentions(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it lists the parameters that belong to no layer
        return torch_pruning.pruner.BasePruner(
            model,
            image,
            importance,
            global_pruning=False,
            pruning_ratio=ratio,
            ignored_layers=ignored,
            num_heads=heads,
            prune_num_heads=whole_heads,
            prune_head_dims=not whole_heads,
            head_pruning_ratio=ratio if whole_heads else 0.0,
            in_channel_groups={},
            out_channel_groups={},
        )


def settle_heads(model: nn.Module, pruner: Any) -> None:
    """Set the attributes of attention modules that follow from the pruned weights, which is left to the user."""
    for module, layer in _attentions(model):
        module.num_heads = pruner.num_heads[layer]
        if hasattr(module, "attn_dim"):
            module.attn_dim = layer.out_features // 3
        module.head_dim = layer.out_features // 3 // module.num_heads


def _attentions(model: nn.Module) -> list[tuple[Any, Any]]:
    """Modules that count heads, with the layer that makes their queries, keys and values."""
    found = []
    for module in model.modules():
        layer = next((value for name in LAYERS if isinstance(value := getattr(module, name, None), nn.Linear)), None)
        if layer is not None and isinstance(getattr(module, "num_heads", None), int):
            found.append((module, layer))
    return found
