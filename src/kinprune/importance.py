"""Importance: a score a unit for all groups at once, from the weights or from a few batches.

Each function gives ``float64 [u]``, higher for what should stay. Gradient criteria need no hooks: a gate on a unit at
the entrance of the layers that take it in has the gradient ``sum of weight * gradient`` over the unit's incoming
weights there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kinprune.errors import ImportanceError
from kinprune.preprocessing import Preprocessing
from kinprune.preprocessing import normalise as normalise_images
from kinprune.tasks import Split
from kinprune.units import UnitSpace
from kinprune.units.layout import unit_of
from kinprune.units.modes import evaluating
from kinprune.units.space import PartRole

Scores = NDArray[np.float64]
Criterion = Literal["random", "l1", "l2", "bn-scale", "activation", "taylor", "snip", "synflow"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
Normalisation = Literal["none", "mean", "max", "l2"]


@dataclass(frozen=True)
class Batch:
    """Normalised images ``[n, 3, h, w]`` and their labels ``[n]``."""

    images: Tensor
    labels: Tensor


def draw_batches(
    split: Split, preprocessing: Preprocessing, images: int, batch: int, *, seed: int, device: str = "cpu"
) -> Iterator[Batch]:
    """Up to ``images`` training images, ``batch`` at a time, drawn with ``seed`` without replacement."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    for chosen in torch.split(order[:images], batch):
        yield Batch(normalise_images(split.images[chosen].to(device), preprocessing), split.labels[chosen].to(device))


def score(
    criterion: Criterion, model: nn.Module, space: UnitSpace, batches: Iterable[Batch] = (), *, seed: int = 0
) -> Scores:
    """The scores of one criterion; ``batches`` are read by activation, taylor and snip, once each.

    Raises:
        ImportanceError: the criterion is unknown, or says nothing on this model or without batches.
    """
    if criterion not in CRITERIA:
        raise ImportanceError(f"there is no importance '{criterion}', expected one of: {', '.join(CRITERIA)}")
    if criterion == "random":
        return random(space, seed)
    if criterion in ("l1", "l2"):
        return magnitude(model, space, power=1 if criterion == "l1" else 2)
    if criterion == "bn-scale":
        return batch_norm_scale(model, space)
    if criterion == "synflow":
        return synflow(model, space, batches)
    by_batches: dict[str, Callable[[nn.Module, UnitSpace, Iterable[Batch]], Scores]] = {
        "activation": activation,
        "taylor": taylor,
        "snip": snip,
    }
    return by_batches[criterion](model, space, batches)


def random(space: UnitSpace, seed: int) -> Scores:
    """Uniform in [0, 1)."""
    return np.random.default_rng(seed).random(len(space))


def magnitude(model: nn.Module, space: UnitSpace, *, power: int) -> Scores:
    """The L1 norm (``power=1``) or L2 norm (``power=2``) of the weights that make a unit (Li et al. 2017)."""
    summed = _by_unit(space, model, "produces", lambda _, tensor: tensor.detach().abs() ** power)
    return summed if power == 1 else np.sqrt(summed)


def batch_norm_scale(model: nn.Module, space: UnitSpace) -> Scores:
    """|gamma| of the batch norm behind a unit, averaged over the unit's channels (Liu et al. 2017, network slimming).

    Raises:
        ImportanceError: a group has no batch norm, or all scales are equal (folded into the weights).
    """
    scales = []
    for number, group in enumerate(space.groups):
        norms = [
            (name, dimension)
            for name, dimension in group.tensors("carries")
            if name.endswith("weight")
            and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.modules.batchnorm._BatchNorm)
        ]
        if not norms:
            raise ImportanceError(
                f"bn-scale needs a batch norm behind every group, {group.name} has none: use taylor, l1 or activation"
            )
        scales.append(
            _mean_by_unit(space, number, {name: (0, model.get_parameter(name).detach().abs()) for name, _ in norms})
        )
    result = np.concatenate(scales)
    if np.ptp(result) == 0:
        raise ImportanceError(
            "bn-scale says nothing here: every batch norm scale is equal (they are folded into the weights): "
            "use taylor, l1 or activation"
        )
    return result


def activation(model: nn.Module, space: UnitSpace, batches: Iterable[Batch]) -> Scores:
    """Mean absolute input that a unit gives to the layers that take it in.

    Raises:
        ImportanceError: there is no batch, or a layer's weights are used without calling it.
    """
    wanted = {name.rpartition(".")[0] for group in space.groups for name, _ in group.tensors("consumes")}
    sums: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_absolute_inputs(name, sums)) for name in sorted(wanted)
    ]
    count = 0
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                model(batch.images)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    _need(count, "activation")
    result = np.zeros(len(space))
    for number, (group, part) in enumerate(zip(space.groups, space.split(result), strict=True)):
        seen = {
            name: (dimension, sums[name.rpartition(".")[0]] / count)
            for name, dimension in group.tensors("consumes")
            if name.rpartition(".")[0] in sums
        }
        if not seen:
            raise ImportanceError(
                f"activation cannot see what {group.name} gives: the model uses the weights of "
                f"{group.tensors('consumes')[0][0].rpartition('.')[0]} without calling that layer: use taylor or l1"
            )
        part[:] = _mean_by_unit(space, number, seen)
    return result


def _absolute_inputs(name: str, sums: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().abs()
        channel = 1 if isinstance(module, nn.modules.conv._ConvNd) else values.dim() - 1
        mean = values.movedim(channel, 0).flatten(1).mean(1).double().cpu()
        sums[name] = sums[name] + mean if name in sums else mean

    return hook


def taylor(model: nn.Module, space: UnitSpace, batches: Iterable[Batch]) -> Scores:
    """``(sum of g * w over the unit)^2`` a mini-batch, averaged over batches (Molchanov et al. 2019, first order)."""
    return _average("taylor", [gate**2 for gate in _gate_gradients(model, space, batches)])


def snip(model: nn.Module, space: UnitSpace, batches: Iterable[Batch]) -> Scores:
    """``|dL / d gate|`` averaged over batches (Lee et al. 2019 on structured gates; Michel et al. 2019 on heads)."""
    return _average("snip", [np.abs(gate) for gate in _gate_gradients(model, space, batches)])


def synflow(model: nn.Module, space: UnitSpace, batches: Iterable[Batch] = (), *, image_size: int = 0) -> Scores:
    """``|theta * dR / dtheta|`` summed over a unit, R the sum of outputs on |theta| for an all-ones input.

    Tanaka et al. 2020. It reads no data; a batch, where given, only tells the shape of the input. Weights are taken
    by absolute value in double precision while it runs and restored exactly.
    """
    shape = next((batch.images.shape[1:] for batch in batches), None)
    if shape is None:
        raise ImportanceError("synflow needs one batch to know the shape of the images: give some batches")
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    positive = {
        name: tensor.detach().double().abs().requires_grad_(tensor.is_floating_point())
        for name, tensor in parameters.items()
    }
    state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in buffers.items()}
    with evaluating(model):
        ones = torch.ones((1, *shape), dtype=torch.float64, device=next(iter(positive.values())).device)
        total = torch.func.functional_call(model, {**positive, **state}, (ones,)).sum()
        gradients = torch.autograd.grad(total, list(positive.values()), allow_unused=True)
    flows = {
        name: torch.zeros_like(tensor) if gradient is None else (tensor.detach() * gradient).abs()
        for (name, tensor), gradient in zip(positive.items(), gradients, strict=True)
    }
    result = _by_unit(space, model, "consumes", _among(flows))
    if not np.isfinite(result).all():
        raise ImportanceError("synflow overflowed on this model: use taylor, l1 or activation")
    return result


def _gate_gradients(model: nn.Module, space: UnitSpace, batches: Iterable[Batch]) -> Iterator[Scores]:
    """dL/dgate of every unit for each batch; gradients left in the model are put back as they were."""
    names = sorted({name for group in space.groups for name, _ in group.tensors("consumes")})
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in names]
    flags = [parameter.requires_grad for parameter in wanted]
    for parameter in wanted:
        parameter.requires_grad_(True)
    try:
        with evaluating(model):
            for batch in batches:
                logits = model(batch.images)
                loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.labels)
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
                products = {
                    name: torch.zeros_like(tensor) if gradient is None else tensor.detach() * gradient
                    for name, tensor, gradient in zip(names, wanted, gradients, strict=True)
                }
                yield _by_unit(space, model, "consumes", _among(products))
    finally:
        for parameter, flag in zip(wanted, flags, strict=True):
            parameter.requires_grad_(flag)


def _average(name: str, gates: list[Scores]) -> Scores:
    _need(len(gates), name)
    result = np.mean(gates, axis=0)
    if not np.isfinite(result).all():
        raise ImportanceError(f"{name} gave a value that is not finite: the model's loss or gradients overflow")
    return np.asarray(result, dtype=np.float64)


def _need(batches: int, name: str) -> None:
    if not batches:
        raise ImportanceError(f"{name} needs at least one batch of images, got none: give some batches")


def _by_unit(space: UnitSpace, model: nn.Module, role: PartRole, values: Callable[[str, Tensor], Tensor]) -> Scores:
    """Sums over each unit of ``values(name, tensor)``, over the tensors that have ``role`` for its group."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    result = np.zeros(len(space))
    sums: dict[tuple[str, int], NDArray[np.float64]] = {}
    counts = space.sizes.tolist()
    for number, (group, part) in enumerate(zip(space.groups, space.split(result), strict=True)):
        for name, dimension in group.tensors(role):
            if (name, dimension) not in sums:
                tensor = values(name, parameters[name])
                rest = [place for place in range(tensor.dim()) if place != dimension]
                sums[name, dimension] = tensor.sum(dim=rest, dtype=torch.float64).cpu().numpy()
            units = unit_of(space.tensors[name][dimension], number, counts)
            inside = units >= 0
            part += np.bincount(units[inside], sums[name, dimension][inside], minlength=len(part))
    return result


def _among(values: Mapping[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    return lambda name, _: values[name]


def _mean_by_unit(space: UnitSpace, number: int, tensors: dict[str, tuple[int, Tensor]]) -> Scores:
    """The mean of one-dimensional ``tensors`` (name -> dimension it describes, values) over each unit's indices."""
    size, counts = space.groups[number].size, space.sizes.tolist()
    total, weight = np.zeros(size), np.zeros(size)
    for name, (dimension, values) in tensors.items():
        units = unit_of(space.tensors[name][dimension], number, counts)
        inside = units >= 0
        total += np.bincount(units[inside], values.double().cpu().numpy()[inside], minlength=size)
        weight += np.bincount(units[inside], minlength=size)
    return total / np.maximum(weight, 1)


def normalise(space: UnitSpace, scores: Scores, how: Normalisation = "mean") -> Scores:
    """Scores made comparable over groups: divided by their group's mean, largest or root mean square.

    The root mean square, not the plain norm, stands behind ``l2``, so that large groups are not made small. A group
    of zeros stays zeros. Order inside a group never changes.
    """
    result = np.array(scores, dtype=np.float64)
    for part in space.split(result):
        scale = {
            "none": 1.0,
            "mean": np.abs(part).mean(),
            "max": np.abs(part).max(),
            "l2": np.sqrt((part**2).mean()),
        }[how]
        if scale > 0:
            part /= scale
    return result


def rank(space: UnitSpace, scores: Scores, ties: Sequence[Scores] = ()) -> NDArray[np.int64]:
    """The place of each unit in its group, 0 the best, ``int64 [u]``; ties go by ``ties`` in order, then by index."""
    result = np.empty(len(space), dtype=np.int64)
    keys = [np.arange(len(space)), *[-np.asarray(tie) for tie in reversed(ties)], -np.asarray(scores), space.group_of]
    order = np.lexsort(keys)
    result[order] = np.arange(len(space)) - np.repeat(space.offsets[:-1], space.sizes)
    return result
