"""Layer-wise reconstruction: the layers after removed units are solved again to answer as the dense model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from kinprune.calibration.batch_norm import is_folded
from kinprune.calibration.least_squares import Moments, RidgeFit, moments_of, solve_towards_zero
from kinprune.calibration.memory import images_in_memory
from kinprune.calibration.residual import ReconstructionLayer, affine, describe_layers, scaling
from kinprune.errors import TaskError, TrainingError
from kinprune.evaluation import device_of, eval_mode
from kinprune.preprocessing import Preprocessing, normalise

RIDGES = (1e-4, 1e-2, 1e-1, 1.0)
"""Candidate ridges towards the present weights, as shares of the inputs' mean variance."""
CHUNK_NUMBERS = 4_000_000
"""How many numbers of unfolded inputs are held at once."""


@dataclass(frozen=True)
class LayerReconstruction:
    """What became of one layer.

    ``before`` and ``after`` are the squared errors against the target on the calibration rows, as shares of the
    target's variance; ``ridge`` is the penalty chosen. A layer that was left as it was has ``skipped``: the reason.
    """

    name: str
    before: float | None = None
    after: float | None = None
    ridge: float | None = None
    skipped: str | None = None


@torch.no_grad()
def reconstruct(
    pruned: nn.Module,
    dense: nn.Module,
    layers: Sequence[str | ReconstructionLayer],
    images: Tensor,
    preprocessing: Preprocessing,
    *,
    ridges: Sequence[float] = RIDGES,
    max_images: int = 256,
    max_rows: int = 16384,
    memory_mb: int = 1024,
    seed: int = 0,
) -> tuple[LayerReconstruction, ...]:
    """Solve the named layers of ``pruned`` again, so that each answers as the same layer of ``dense`` does.

    Each layer (Linear, or Conv2d without groups) gets the weights, and bias, of least squared error between its output
    on the pruned model's OWN inputs and the dense model's output on the same images, plus a ridge towards its present
    weights. All is done in one pass of each model: when the pruned pass reaches a layer, the layer is solved and its
    new output goes on, so later layers see the earlier corrections. Where a layer's output is added to a residual
    stream (plain names are completed by ``describe_layers``), its target also makes up for what the stream lacks.
    A layer without bias before a batch norm has its intercept put into the norm.

    ``images`` are uint8 ``[n, 3, h, w]``; at most ``max_images`` are drawn with ``seed``, fewer where the pruned pass
    would need more than about ``memory_mb`` MiB, and of each at most ``max_rows / n`` output positions are used.
    The ridge is chosen by fitting one half of the images and testing on the other, both ways; leaving the layer alone
    is a candidate too, and no layer ends with a larger error on its rows than it had. Returns a result a layer, in the
    order given. Raises TaskError without images, TrainingError for a name that a model lacks.
    """
    if len(images) < 1 or min(max_images, max_rows) < 1:
        raise TaskError(f"{len(images)} images were given to reconstruct layers; expected at least 1, and limits >= 1")
    if not ridges or min(ridges) <= 0:
        raise TrainingError(f"ridges are {tuple(ridges)}; expected at least one, each above 0")
    wanted = describe_layers(dense, layers)
    results = {layer.name: _refusal(layer, pruned, dense) for layer in wanted}
    solvable = [layer for layer in wanted if results[layer.name] is None]
    if solvable:
        generator = torch.Generator().manual_seed(seed)
        limit = min(max_images, images_in_memory(pruned, images[:1], preprocessing, memory_mb))
        chosen = images[torch.randperm(len(images), generator=generator)[:limit]]
        targets = _Targets(len(chosen), max_rows, generator)
        _run(dense, solvable, torch.split(chosen, 32), preprocessing, targets.record)
        solver = _Solver(targets, tuple(ridges))
        _run(pruned, solvable, (chosen,), preprocessing, solver.solve)
        results.update(solver.results)
    return tuple(
        results[layer.name] or LayerReconstruction(layer.name, skipped="a forward never reaches it") for layer in wanted
    )


@dataclass(frozen=True, eq=False)
class _Passage:
    """A forward that has just left a layer: its module, input and output, and the stream it will be added to."""

    layer: ReconstructionLayer
    module: nn.Linear | nn.Conv2d
    scale: nn.Module | None
    inputs: Tensor
    output: Tensor
    shortcut: Tensor | None


class _Targets:
    """The dense model's rows: each layer's output, or the stream after it, at the drawn positions."""

    def __init__(self, images: int, max_rows: int, generator: torch.Generator) -> None:
        self.images = images
        self.per_image = max(1, max_rows // images)
        self.generator = generator
        self.positions: dict[str, Tensor | None] = {}
        self.rows: dict[str, list[Tensor]] = {}

    def record(self, passage: _Passage) -> None:
        name = passage.layer.name
        rows = _as_rows(passage.module, passage.output)
        if name not in self.rows:
            self.positions[name] = self._draw(rows.shape[1])
            self.rows[name] = []
        positions, start = self.positions[name], sum(len(part) for part in self.rows[name])
        rows = _pick(rows, positions, start)
        multiplier, shift = affine(passage.scale, rows)
        rows = rows * multiplier + shift
        if passage.shortcut is not None:
            rows = rows + _pick(_as_rows(passage.module, passage.shortcut), positions, start)
        if passage.layer.outputs is not None:
            rows = rows[..., list(passage.layer.outputs)]
        self.rows[name].append(rows)

    def take(self, name: str) -> Tensor:
        """The rows of a layer, ``[images recorded, positions, channels]``, which are then forgotten."""
        rows = self.rows.pop(name, [])
        return torch.cat(rows) if rows else torch.empty(0)

    def _draw(self, count: int) -> Tensor | None:
        """Positions ``[images, per_image]`` of each image's ``count``, in order; None for all of them."""
        if count <= self.per_image:
            return None
        noise = torch.rand(self.images, count, generator=self.generator)
        return noise.topk(self.per_image, dim=1).indices.sort(dim=1).values


class _Solver:
    """Solves each layer when the pruned model's pass reaches it, and lets the pass go on with the new output."""

    def __init__(self, targets: _Targets, ridges: tuple[float, ...]) -> None:
        self.targets = targets
        self.ridges = ridges
        self.results: dict[str, LayerReconstruction] = {}

    def solve(self, passage: _Passage) -> Tensor | None:
        name, module = passage.layer.name, passage.module
        positions = self.targets.positions.get(name)
        present = _pick(_as_rows(module, passage.output), positions, 0)
        stream = self.targets.take(name).to(present)
        if stream.shape != present.shape:
            self.results[name] = LayerReconstruction(
                name,
                skipped=f"it answers {list(present.shape)}, the dense model's {list(stream.shape)}; "
                "expected the same outputs, and one call a forward",
            )
            return None
        target = _target(passage, stream, present, positions)
        intercept = module.bias is not None or isinstance(passage.scale, _BatchNorm)
        halves = _halves(module, passage.inputs, positions, (target - present).double())
        fit = solve_towards_zero(halves, self.ridges, intercept=intercept)
        variance = float((target - target.mean((0, 1))).double().square().sum()) or 1.0
        before = sum(half.squares for half in halves) / variance
        if isinstance(fit, str):
            self.results[name] = LayerReconstruction(name, before, before, None, skipped=fit)
            return None
        self.results[name] = LayerReconstruction(name, before, fit.error / variance, fit.ridge)
        _apply(module, passage.scale, fit)
        changed: Tensor = module.forward(passage.inputs)
        return changed


def _target(passage: _Passage, stream: Tensor, present: Tensor, positions: Tensor | None) -> Tensor:
    """What the layer should answer for the stream after it to be ``stream``, rows ``[n, positions, channels]``."""
    if passage.shortcut is not None:
        stream = stream - _pick(_as_rows(passage.module, passage.shortcut), positions, 0)
    multiplier, shift = affine(passage.scale, present)
    # A channel that its scale all but switches off cannot be corrected through it: it is left as it is.
    alive = multiplier.abs() > 1e-3 * multiplier.abs().max()
    return torch.where(alive, (stream - shift) / torch.where(alive, multiplier, 1.0), present)


def _apply(module: nn.Linear | nn.Conv2d, scale: nn.Module | None, fit: RidgeFit) -> None:
    module.weight.add_(fit.weight.view(module.weight.shape).to(module.weight))
    if module.bias is not None:
        module.bias.add_(fit.bias.to(module.bias))
    elif isinstance(scale, _BatchNorm) and scale.running_mean is not None:
        if is_folded(scale):
            scale.bias.add_((affine(scale, fit.bias)[0] * fit.bias).to(scale.bias))
        else:
            scale.running_mean.sub_(fit.bias.to(scale.running_mean))


def _run(
    model: nn.Module,
    layers: Sequence[ReconstructionLayer],
    batches: Sequence[Tensor],
    preprocessing: Preprocessing,
    visit: Callable[[_Passage], Tensor | None],
) -> None:
    device = device_of(model)
    with eval_mode(model), _visiting(model, layers, visit):
        for batch in batches:
            model(normalise(batch.to(device), preprocessing))


@contextmanager
def _visiting(
    model: nn.Module, layers: Sequence[ReconstructionLayer], visit: Callable[[_Passage], Tensor | None]
) -> Iterator[None]:
    """Hooks that call ``visit`` whenever a forward leaves one of the layers; what it returns replaces the output."""
    streams: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []

    def watch(layer: ReconstructionLayer, at: nn.Module, where: str) -> None:
        def see_input(_: nn.Module, args: tuple[Any, ...]) -> None:
            streams[layer.name] = args[0]

        def see_output(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            streams[layer.name] = output

        if where == "input":
            handles.append(at.register_forward_pre_hook(see_input))
        else:
            handles.append(at.register_forward_hook(see_output))

    def stop_at(layer: ReconstructionLayer, module: nn.Linear | nn.Conv2d) -> None:
        def leave(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            shortcut = streams.pop(layer.name, None)
            if shortcut is not None and layer.through is not None:
                shortcut = model.get_submodule(layer.through)(shortcut)
            return visit(_Passage(layer, module, scaling(model, layer.scale), args[0], output, shortcut))

        handles.append(module.register_forward_hook(leave))

    try:
        for layer in layers:
            if layer.shortcut is not None:
                watch(layer, model.get_submodule(layer.shortcut[0]), layer.shortcut[1])
            module = model.get_submodule(layer.name)
            assert isinstance(module, nn.Linear | nn.Conv2d)
            stop_at(layer, module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _halves(
    module: nn.Linear | nn.Conv2d, inputs: Tensor, positions: Tensor | None, residual: Tensor
) -> tuple[Moments, Moments]:
    """The moments of (inputs, residual) rows over the even and over the odd images."""
    width = module.weight[0].numel()
    unfolded = width * (inputs[0, 0].numel() if isinstance(module, nn.Conv2d) else residual.shape[1])
    step = max(1, CHUNK_NUMBERS // unfolded)

    def total(half: int) -> Moments:
        index = torch.arange(half, len(inputs), 2, device=inputs.device)
        moments = Moments.zero(width, residual.shape[-1], inputs.device)
        for chunk in torch.split(index, step):
            rows = _input_rows(module, inputs[chunk])
            rows = _pick(rows, None if positions is None else positions.to(rows.device)[chunk], 0)
            moments = moments + moments_of(rows.flatten(0, 1).double(), residual[chunk].flatten(0, 1))
        return moments

    return total(0), total(1)


def _input_rows(module: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """What the layer's weights meet at each output position: ``[n, positions, weights an output]``."""
    if isinstance(module, nn.Linear):
        return _as_rows(module, inputs)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    return functional.unfold(padded, kernel, dilation=dilation, stride=stride).transpose(1, 2)


def _as_rows(module: nn.Module, tensor: Tensor) -> Tensor:
    """``[n, c, h, w]`` of a convolution, or ``[n, ..., c]`` of a Linear, as ``[n, positions, c]``."""
    if isinstance(module, nn.Conv2d):
        return tensor.flatten(2).transpose(1, 2)
    return tensor.unsqueeze(1) if tensor.ndim == 2 else tensor.flatten(1, -2)


def _pick(rows: Tensor, positions: Tensor | None, start: int) -> Tensor:
    """The rows at each image's drawn positions; ``start`` is the first image's place in ``positions``."""
    if positions is None:
        return rows
    chosen = positions[start : start + len(rows)].to(rows.device).unsqueeze(-1)
    return rows.gather(1, chosen.expand(-1, -1, rows.shape[-1]))


def _refusal(layer: ReconstructionLayer, pruned: nn.Module, dense: nn.Module) -> LayerReconstruction | None:
    """Why a layer cannot be solved, from its modules alone; None where it can."""
    modules = []
    for which, model in (("pruned", pruned), ("dense", dense)):
        try:
            modules.append(model.get_submodule(layer.name))
        except AttributeError as error:
            raise TrainingError(
                f"the {which} model has no layer {layer.name!r}; expected the dotted name of a Linear or Conv2d in both"
            ) from error
    own, whole = modules
    # Subclasses may standardise weights or pad on their own: their forward is not the one that is solved.
    plain = isinstance(own, nn.Linear | nn.Conv2d) and type(own) in (nn.Linear, nn.Conv2d)
    if not plain or not isinstance(whole, nn.Linear | nn.Conv2d) or type(whole) is not type(own):
        return LayerReconstruction(layer.name, skipped=f"it is a {type(own).__name__}, not a Linear or Conv2d")
    if isinstance(own, nn.Conv2d) and own.groups > 1:
        return LayerReconstruction(layer.name, skipped=f"it is a convolution of {own.groups} groups")
    outputs = len(whole.weight) if layer.outputs is None else len(layer.outputs)
    if len(own.weight) != outputs:
        return LayerReconstruction(
            layer.name, skipped=f"it has {len(own.weight)} outputs where the dense model has {outputs}"
        )
    return None
