"""The one layer of a model that makes its logits: finding it and giving it another number of classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kinprune.errors import BackboneError


def find_classifier(model: nn.Module, image_size: tuple[int, int] = (224, 224)) -> str:
    """Dotted name of the one ``nn.Linear`` (or 1x1 convolution) whose output is the model's logits.

    timm models say which one it is. Of any other model one blank image ``[1, 3, h, w]`` of ``image_size`` is run, and
    it is the layer whose output the model returns. Raises BackboneError where there is none, or where two heads share
    the work (distilled models).
    """
    declared = _declared(model)
    return declared if declared is not None else _traced(model, image_size)


def answer(model: nn.Module, image_size: tuple[int, int]) -> Tensor:
    """The logits ``[1, classes]`` of one blank image, in evaluation mode; BackboneError if the model gives none."""
    height, width = image_size
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            output: Any = model(torch.zeros(1, 3, height, width))
    except Exception as error:  # the model may be the user's own; the cause stays attached
        raise BackboneError(
            f"{type(model).__name__} does not run on one image of 3x{height}x{width}: {type(error).__name__}: {error}. "
            "Give an image size the model takes."
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(output, Tensor):
        raise BackboneError(f"{type(model).__name__} returns {type(output).__name__}, expected one tensor of logits.")
    if output.ndim != 2 or output.shape[0] != 1:
        raise BackboneError(
            f"{type(model).__name__} answers one image with the shape {list(output.shape)}, expected [1, classes]: "
            "use an image classifier, pooling and head included."
        )
    return output


def set_num_classes(model: nn.Module, head: str, num_classes: int) -> None:
    """Replace the layer ``head`` by a newly initialised one of ``num_classes`` outputs, unless it has as many."""
    old = _submodule(model, head)
    new: nn.Module
    if isinstance(old, nn.Linear):
        if old.out_features == num_classes:
            return
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    elif _is_classifier(old) and isinstance(old, nn.Conv2d):
        if old.out_channels == num_classes:
            return
        new = nn.Conv2d(old.in_channels, num_classes, 1, bias=old.bias is not None)
    else:
        raise BackboneError(f"The head {head!r} is {type(old).__name__}, expected nn.Linear or a 1x1 convolution.")
    parent, _, child = head.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(old.training))
    if isinstance(getattr(model, "num_classes", None), int):
        model.num_classes = num_classes  # type: ignore[assignment]


def _declared(model: nn.Module) -> str | None:
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):
        return None
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, dict) else None
    heads = [named] if isinstance(named, str) else [head for head in named or () if _has_weights(model, head)]
    classifier = get_classifier()
    if len(heads) > 1 or isinstance(classifier, tuple | list | nn.ModuleList):
        which = f" ({', '.join(heads)})" if len(heads) > 1 else ""
        raise BackboneError(
            f"{type(model).__name__} has more than one head{which}, expected one classifier: "
            "use a model with a single head; most distilled models have a plain variant."
        )
    if not _is_classifier(classifier):
        return None
    return next((name for name, module in model.named_modules() if module is classifier), None)


def _traced(model: nn.Module, image_size: tuple[int, int]) -> str:
    calls: list[tuple[str, Tensor]] = []  # holds the outputs, so that no storage is used twice meanwhile
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: calls.append((name, output)))
        for name, module in model.named_modules()
        if _is_classifier(module)
    ]
    try:
        logits = answer(model, image_size)
    finally:
        for handle in handles:
            handle.remove()
    for name, output in reversed(calls):
        same_memory = output.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
        if same_memory and output.numel() == logits.numel():
            return name
    raise BackboneError(
        f"No nn.Linear or 1x1 convolution of {type(model).__name__} makes the logits it returns: expected a model that "
        "ends in one, with no softmax or averaging of heads after it."
    )


def _is_classifier(module: object) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _has_weights(model: nn.Module, name: str) -> bool:
    return any(key.startswith(f"{name}.") for key, _ in model.named_parameters())


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise BackboneError(f"{type(model).__name__} has no layer {name!r} to be its head.") from error
