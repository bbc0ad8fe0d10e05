"""Weights in a local safetensors file: reading them, what the file says of itself, and fitting them to a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kinprune.backbones.spec import CONSTRUCTION_FAILURES, architecture_name, is_factory
from kinprune.errors import BackboneError

_PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar"})
# Counted by batch norm and never read in evaluation; older files lack it.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Hints:
    """What a file's metadata says of its weights; None where it says nothing. ``image_size`` is (height, width)."""

    architecture: str | None = None
    num_classes: int | None = None
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a file, floating-point ones as float32, and its hints."""

    path: Path
    tensors: dict[str, Tensor]
    hints: Hints


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a safetensors file.

    Raises BackboneError if there is none, it is damaged or of another format, or a weight is not a finite number.
    """
    _check_format(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise BackboneError(
            f"{path} is no safetensors file, or a damaged one ({error}). Fetch it again, or convert the weights with "
            "safetensors.torch.save_file(model.state_dict(), path)."
        ) from error
    if not tensors:
        raise BackboneError(f"{path} holds no tensors, expected a model's state_dict.")
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[key] = tensor.to(torch.float32)
            if not bool(torch.isfinite(tensors[key]).all()):
                raise BackboneError(f"{path}: tensor {key!r} holds NaN or infinity, expected finite weights.")
    return Checkpoint(path, tensors, _parse_hints(path, metadata))


def check_architecture(checkpoint: Checkpoint, name: str) -> None:
    """Raise BackboneError if the file's metadata names another architecture than ``name``."""
    said = checkpoint.hints.architecture
    if said is not None and architecture_name(said) != architecture_name(name):
        raise BackboneError(
            f"{checkpoint.path} says it holds weights of {said!r}, not of {architecture_name(name)!r}. "
            f"Use {said!r} as the backbone, or another file."
        )


def load_weights(model: nn.Module, checkpoint: Checkpoint, name: str, head: str) -> None:
    """Copy a file's weights into ``model``, every tensor of it but the classifier ``head``.

    timm's own filter for the architecture resamples position embeddings and relative position tables to the model's
    image size, and renames tensors of older and original files. The classifier is copied if it has the model's
    number of classes, and stays as it is otherwise. Raises BackboneError naming the tensors that do not fit.
    """
    tensors = _filtered(model, checkpoint, name)
    expected = model.state_dict()
    for key in _replaced_classifier(tensors, expected, checkpoint, head):
        tensors[key] = expected[key]
    for key, value in expected.items():
        if key.endswith(_COUNTER):
            tensors.setdefault(key, value)
    buffers = {key for key, _ in model.named_buffers()}  # older files also hold what is now computed
    tensors = {key: value for key, value in tensors.items() if key in expected or key not in buffers}
    _check_fit(tensors, expected, checkpoint.path, architecture_name(name))
    model.load_state_dict(tensors)


def _check_format(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise BackboneError(f"The weights file {path} {what}, expected a .safetensors file.")
    if path.suffix.lower() in _PICKLES:
        raise BackboneError(
            f"{path} is a pickle, which can run any code when it is read, and is refused. Convert it once, where you "
            "trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')."
        )
    if path.suffix.lower() != ".safetensors":
        raise BackboneError(f"{path} ends in {path.suffix or 'nothing'!r}, expected a .safetensors file.")


def _parse_hints(path: Path, metadata: Mapping[str, str]) -> Hints:
    def read(key: str, parse: Callable[[str], Any], expected: str) -> Any:
        if key not in metadata:
            return None
        try:
            return parse(metadata[key])
        except ValueError as error:
            raise BackboneError(
                f"{path}: the metadata says {key} = {metadata[key]!r}, expected {expected}. Write the file again."
            ) from error

    return Hints(
        architecture=metadata.get("architecture"),
        num_classes=read("num_classes", int, "a whole number"),
        image_size=read("input_size", _parse_size, "channels, height and width such as '3 64 64'"),
        mean=read("mean", _parse_three, "three numbers such as '0.5 0.5 0.5'"),
        std=read("std", _parse_three, "three numbers such as '0.5 0.5 0.5'"),
        interpolation=metadata.get("interpolation"),
        crop_pct=read("crop_pct", float, "a number"),
    )


def _parse_three(text: str) -> tuple[float, float, float]:
    first, second, third = (float(word) for word in text.split())
    if not all(map(math.isfinite, (first, second, third))):
        raise ValueError(text)
    return first, second, third


def _parse_size(text: str) -> tuple[int, int]:
    channels, height, width = (int(word) for word in text.split())
    if channels != 3 or height < 1 or width < 1:
        raise ValueError(text)
    return height, width


def _filtered(model: nn.Module, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    filter_weights = None if is_factory(name) else _timm_filter(model, name)
    if filter_weights is None:
        return dict(checkpoint.tensors)
    if checkpoint.hints.image_size is not None:
        # where timm looks for the grid of a position embedding that is not square
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, *checkpoint.hints.image_size)}  # type: ignore
    try:
        return filter_weights(dict(checkpoint.tensors), model)
    except CONSTRUCTION_FAILURES as error:
        raise BackboneError(
            f"{checkpoint.path} does not hold weights of {architecture_name(name)!r}: timm cannot read or resample "
            f"them ({type(error).__name__}: {error}). Give the name of the model they were saved from."
        ) from error


def _timm_filter(model: nn.Module, name: str) -> Callable[..., dict[str, Tensor]] | None:
    """The filter timm passes pre-trained weights of this architecture through: each family's module has its own."""
    modules = [timm.model_entrypoint(architecture_name(name)).__module__, *(c.__module__ for c in type(model).__mro__)]
    found = (getattr(sys.modules.get(module), "checkpoint_filter_fn", None) for module in modules)
    return next((function for function in found if function is not None), None)


def _replaced_classifier(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], checkpoint: Checkpoint, head: str
) -> list[str]:
    """The keys of a classifier the file lacks, or has for another number of classes."""
    keys = [key for key in (f"{head}.weight", f"{head}.bias") if key in expected]
    given = tensors.get(f"{head}.weight")
    if given is None:
        return [] if f"{head}.bias" in tensors else keys
    said = checkpoint.hints.num_classes
    if said is not None and said != given.shape[0]:
        raise BackboneError(
            f"{checkpoint.path}: the metadata says {said} classes, its classifier {head!r} has {given.shape[0]}. "
            "Write the file again with the right number."
        )
    wanted = expected[f"{head}.weight"]
    return keys if given.shape[1:] == wanted.shape[1:] and given.shape[0] != wanted.shape[0] else []


def _check_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, architecture: str) -> None:
    problems = []
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    shapes = [
        f"{key!r} is {_shape(tensors[key])}, expected {_shape(value)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_some(shapes, quote=False)})")
    kinds = [
        f"{key!r} is {tensors[key].dtype}"
        for key, value in expected.items()
        if key in tensors and value.is_floating_point() != tensors[key].is_floating_point()
    ]
    if kinds:
        problems.append(f"{len(kinds)} of another type, such as quantised ({_some(kinds, quote=False)})")
    if problems:
        raise BackboneError(
            f"{path} does not fit {architecture!r}. Tensors: {'; '.join(problems)}. "
            "Give the model these weights were saved from, at an image size they can be resampled to."
        )


def _some(items: list[str], *, quote: bool = True) -> str:
    shown = [repr(item) if quote else item for item in items[:3]]
    return ", ".join(shown) + (" ..." if len(items) > 3 else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
