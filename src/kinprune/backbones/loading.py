"""A backbone ready for use: architecture, weights, preprocessing, and the fingerprint of the three."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from kinprune.backbones.checkpoint import (
    Checkpoint,
    Hints,
    check_architecture,
    load_weights,
    read_checkpoint,
)
from kinprune.backbones.classifier import answer, find_classifier, set_num_classes
from kinprune.backbones.hub import fetch_weights
from kinprune.backbones.inputs import check_least_size, check_patches, resolve_preprocessing
from kinprune.backbones.spec import (
    BackboneSpec,
    build_model,
    check_name,
    check_num_classes,
    is_factory,
    seeded,
)
from kinprune.errors import BackboneError
from kinprune.preprocessing import Preprocessing


@dataclass(frozen=True, eq=False)
class Backbone:
    """A model in evaluation mode and float32, on the CPU, with a classifier of ``spec.num_classes`` logits.

    ``fingerprint`` is the same for the same architecture, preprocessing and weights, whatever the classifier.
    """

    model: nn.Module
    spec: BackboneSpec
    preprocessing: Preprocessing
    fingerprint: str

    @property
    def head(self) -> str:
        """Dotted name of the classifier, an ``nn.Linear`` or a 1x1 convolution."""
        return self.spec.head


def load_backbone(
    name: str,
    *,
    num_classes: int,
    weights: str | Path | None = None,
    random: bool = False,
    seed: int = 0,
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> Backbone:
    """Load the model ``name``: a timm name, with or without a tag, or ``module:factory`` of the user's own code.

    Weights are those of the safetensors file ``weights``; else, with ``random``, newly initialised ones; else those
    timm publishes. A factory's model keeps its own weights unless a file is given. The classifier is newly initialised
    wherever the weights have another number of classes. ``seed`` decides all that is initialised; the global
    generator is left as it was.

    The preprocessing is the model's own, overridden by the file's metadata (``architecture``, ``num_classes``,
    ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``), overridden by the arguments: ``image_size`` in
    pixels (one side, or height and width), ``mean`` and ``std`` a channel for pixels in [0, 1]. Transformers of a
    fixed size are built for ``image_size`` and their position embeddings resampled.

    Raises BackboneError on anything that cannot be used; one blank image is run to be sure.
    """
    check_num_classes(num_classes)
    check_name(name)
    if weights is not None and random:
        raise BackboneError("Both weights and random are given, expected one of them: leave out --random or --weights.")
    checkpoint = _read_weights(name, weights, random)
    overrides = {
        "image_size": image_size,
        "mean": mean,
        "std": std,
        "interpolation": interpolation,
        "crop_pct": crop_pct,
    }
    hints = checkpoint.hints if checkpoint else Hints()
    build = _from_factory if is_factory(name) else _from_timm
    model, spec, preprocessing = build(name, num_classes, seed, hints, overrides)
    if checkpoint:
        load_weights(model, checkpoint, name, spec.head)
    _check_answer(model, spec, preprocessing)
    return Backbone(model, spec, preprocessing, fingerprint(model, spec, preprocessing))


def fingerprint(model: nn.Module, spec: BackboneSpec, preprocessing: Preprocessing) -> str:
    """sha256 over architecture, preprocessing and all weights and persistent buffers but the classifier's."""
    description = {
        "architecture": spec.architecture,
        "arguments": spec.to_json()["arguments"],
        "preprocessing": preprocessing.to_json(),
    }
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for key, tensor in sorted(model.state_dict().items()):
        # the counter changes nothing that the model answers
        if key.startswith(f"{spec.head}.") or key.endswith("num_batches_tracked"):
            continue
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_weights(name: str, weights: str | Path | None, random: bool) -> Checkpoint | None:
    if weights is not None:
        checkpoint = read_checkpoint(Path(weights).expanduser())
        check_architecture(checkpoint, name)
        return checkpoint
    if random or is_factory(name):
        return None
    return read_checkpoint(fetch_weights(name))


def _from_timm(
    name: str, num_classes: int, seed: int, hints: Hints, overrides: Mapping[str, Any]
) -> tuple[nn.Module, BackboneSpec, Preprocessing]:
    config = timm.get_pretrained_cfg(name)
    preprocessing = resolve_preprocessing(vars(config) if config else {}, hints, **overrides)
    arguments: dict[str, Any] = {}
    if config is not None and config.fixed_input_size:
        arguments["img_size"] = list(preprocessing.image_size)
    else:
        check_least_size(preprocessing.image_size)
    model = build_model(name, arguments, num_classes, seed=seed)
    if arguments:
        check_patches(model, preprocessing.image_size)
    head = find_classifier(model, preprocessing.image_size)
    return model, BackboneSpec(name, arguments, num_classes, head), preprocessing


def _from_factory(
    name: str, num_classes: int, seed: int, hints: Hints, overrides: Mapping[str, Any]
) -> tuple[nn.Module, BackboneSpec, Preprocessing]:
    model = build_model(name, {}, num_classes, seed=seed)
    config = getattr(model, "pretrained_cfg", None)
    preprocessing = resolve_preprocessing(config if isinstance(config, dict) else {}, hints, **overrides)
    head = find_classifier(model, preprocessing.image_size)
    with seeded(seed):
        set_num_classes(model, head, num_classes)
    return model, BackboneSpec(name, {}, num_classes, head), preprocessing


def _check_answer(model: nn.Module, spec: BackboneSpec, preprocessing: Preprocessing) -> None:
    logits = answer(model, preprocessing.image_size)
    if logits.shape[1] != spec.num_classes:
        raise BackboneError(
            f"{spec.name!r} answers with {logits.shape[1]} logits, expected {spec.num_classes}: "
            "use a model whose last layer makes one logit a class."
        )
    if not bool(torch.isfinite(logits).all()):
        raise BackboneError(f"{spec.name!r} answers a blank image with NaN or infinity: its weights are unusable.")
