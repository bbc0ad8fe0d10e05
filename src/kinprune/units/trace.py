"""Watching a model run once: every operation, with the axes of what goes in and comes out.

The model runs on the meta device: shapes only, no arithmetic, no weights read. What an operation does to axes is
said in ``rules``; an operation without a rule freezes whatever it touches, under its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kinprune.errors import UnitError
from kinprune.units.axes import Axes
from kinprune.units.copies import copy_around
from kinprune.units.modes import evaluating
from kinprune.units.shapes import run

DATA = "a dimension of the images or of the network's grid"


@dataclass(frozen=True)
class Output:
    """A tensor that an operation gave: its axes, the storage it lives in, bytes an element."""

    axes: tuple[int, ...]
    storage: int
    itemsize: int


@dataclass(frozen=True)
class Operation:
    """One operation of the forward pass.

    ``reads`` are storages of activations; ``macs`` the axes whose sizes multiply to its multiply-accumulates, or
    None where it has none; ``in_place`` that it may write over an input that nobody reads afterwards.
    """

    name: str
    outputs: tuple[Output, ...]
    reads: tuple[int, ...]
    macs: tuple[int, ...] | None
    in_place: bool


@dataclass(frozen=True)
class Step:
    """One operation of any kind: its name, the module it ran in, the axes of its outputs and of its inputs."""

    name: str
    module: str
    outputs: tuple[tuple[int, ...], ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Role:
    """How a layer uses its weight: the axis it makes and the axis it sums over."""

    produces: int
    consumes: int


@dataclass
class Trace:
    """What was seen of one forward pass.

    ``operations`` touch the images; ``steps`` are all operations, for comparing two runs. ``groupings`` are the group
    axes of grouped convolutions and norms by their weight; ``gates`` the layers whose output scales a whole grid
    (squeeze-and-excite); ``joins`` the modules that add to a residual stream; ``shortcuts`` where to find what is added
    to a layer's output.
    """

    axes: Axes = field(default_factory=Axes)
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    groupings: dict[str, int] = field(default_factory=dict)
    gates: set[str] = field(default_factory=set)
    joins: set[str] = field(default_factory=set)
    shortcuts: dict[str, tuple[str, str]] = field(default_factory=dict)
    output: tuple[int, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What is known of a tensor while tracing.

    Its axes; whether it depends on the images; the weight it is a view of; the layer whose output it is, untouched;
    all the layers whose outputs came together in it, element by element; whether a sigmoid made it.
    """

    axes: tuple[int, ...]
    active: bool
    weight: str | None = None
    layer: str | None = None
    sources: frozenset[str] = frozenset()
    squashed: bool = False


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the axes of every tensor through a forward pass; ``rules`` maps operation names to what they do."""

    def __init__(self, trace: Trace, rules: Mapping[str, Callable[[Call], list[tuple[int, ...]]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.axes = trace.axes
        self.rules = rules
        self.stack: list[str] = [""]
        self._seen: dict[int, Seen] = {}
        self._alive: list[Tensor] = []  # identities are only unique among the living
        self._modules: dict[int, tuple[str, str]] = {}

    def declare(self, tensor: Tensor, seen: Seen) -> None:
        """Tell what is known of a tensor."""
        self._seen[id(tensor)] = seen
        self._alive.append(tensor)

    def seen(self, tensor: Tensor) -> Seen:
        """What is known of a tensor; one made inside the model without inputs (a grid, a mask) is fixed data."""
        known = self._seen.get(id(tensor))
        if known is None:
            known = Seen(tuple(self.axes.new(size, DATA) for size in tensor.shape), active=False)
            self.declare(tensor, known)
        return known

    def enter(self, name: str, inputs: tuple[Any, ...]) -> None:
        self.stack.append(name)
        if inputs and isinstance(inputs[0], Tensor):
            self._modules.setdefault(id(inputs[0]), (name, "input"))
            self._alive.append(inputs[0])

    def leave(self, output: Any) -> None:
        name = self.stack.pop()
        if isinstance(output, Tensor):
            self._modules.setdefault(id(output), (name, "output"))

    def shortcut(self, layer: str, other: Tensor) -> None:
        """Remember at which module the tensor passes that is added to what ``layer`` gives."""
        place = self._modules.get(id(other))
        if place is not None:
            self.trace.shortcuts.setdefault(layer, place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        call = Call(self, func, name, args, kwargs)
        call.result = run(func, name, args, kwargs)
        outputs = [item for item in _flat(call.result) if isinstance(item, Tensor)]
        if outputs:
            self._record(call, outputs)
        return call.result

    def _sources(self, inputs: list[Tensor]) -> frozenset[str]:
        known = {self.seen(item).sources for item in inputs if self.seen(item).active}
        return next(iter(known)) if len(known) == 1 else frozenset().union(*known)

    def _record(self, call: Call, outputs: list[Tensor]) -> None:
        inputs = call.tensors
        active = any(self.seen(item).active for item in inputs)
        rule = self.rules.get(call.name if call.name in self.rules else call.name.removesuffix("_"))
        if rule is None and torch.Tag.pointwise in call.func.tags:
            rule = self.rules["pointwise"]
        given = self.rules["unknown"](call) if rule is None else rule(call)
        known: list[Output] = []
        for tensor, axes in zip(outputs, given, strict=True):
            if tuple(self.axes.size(axis) for axis in axes) != tuple(tensor.shape):
                raise AssertionError(f"rule of {call.name}: {axes} does not describe {tuple(tensor.shape)}")
            if not any(tensor is item for item in inputs):  # in place: known already
                sources = frozenset({call.layer}) if call.makes and call.layer else self._sources(inputs)
                self.declare(tensor, Seen(axes, active, call.weight, call.layer, sources, "sigmoid" in call.name))
            elif call.layer is None and self.seen(tensor).layer is not None:  # no longer the layer's own output
                seen = self.seen(tensor)
                self._seen[id(tensor)] = Seen(seen.axes, active, seen.weight, None, self._sources(inputs))
            if active:
                for leaf in (leaf for axis in axes for leaf in self.axes.leaves(axis)):
                    self.axes.facts[leaf].active = True
            known.append(Output(axes, tensor.untyped_storage()._cdata, tensor.element_size()))
        if active:
            reads = tuple(item.untyped_storage()._cdata for item in inputs if self.seen(item).active)
            in_place = torch.Tag.pointwise in call.func.tags
            self.trace.operations.append(Operation(call.name, tuple(known), reads, call.macs, in_place))
        touched = tuple(axis for item in inputs for axis in self.seen(item).axes)
        step = Step(call.name, self.stack[-1], tuple(output.axes for output in known), touched)
        self.trace.steps.append(step)


@dataclass
class Call:
    """One call of an operation, as a rule sees it. A rule returns the axes of every output tensor."""

    tracer: Tracer
    func: Any
    name: str
    args: Any
    kwargs: Any
    result: Any = None
    macs: tuple[int, ...] | None = None
    weight: str | None = None
    layer: str | None = None
    makes: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        return [item for item in _flat((self.args, list(self.kwargs.values()))) if isinstance(item, Tensor)]

    @property
    def results(self) -> list[Tensor]:
        return [item for item in _flat(self.result) if isinstance(item, Tensor)]

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by its place, else by its name, else the default."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in _flat(part)]
    return [value]


def reference_tensor(model: nn.Module) -> Tensor:
    """A tensor whose device and type the model's images share."""
    return next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.empty(0))


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model with its parameters and buffers on the meta device; no weight is copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy_around(model, memo)


def watch(model: nn.Module, image: Tensor, rules: Mapping[str, Any], trace: Trace) -> None:
    """Run ``model`` on ``image`` (both on one device) and write what is seen into ``trace``, as far as it gets."""
    tracer = Tracer(trace, rules)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        if id(tensor) in tracer._seen:  # tied
            axes = tracer._seen[id(tensor)].axes
        else:
            axes = tuple(trace.axes.new(size) for size in tensor.shape)
            tracer.declare(tensor, Seen(axes, active=False, weight=name))
        trace.parameters[name] = axes
    grid = tuple(trace.axes.new(size, DATA) for size in image.shape)
    tracer.declare(image, Seen(grid, active=True))
    given = Output(grid, image.untyped_storage()._cdata, image.element_size())
    trace.operations.append(Operation("input", (given,), (), None, in_place=False))
    names = {module: name for name, module in model.named_modules()}
    handles = [
        nn.modules.module.register_module_forward_pre_hook(
            lambda module, inputs: tracer.enter(names.get(module, ""), inputs)
        ),
        nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: tracer.leave(output),
        ),
    ]
    try:
        with torch.no_grad(), evaluating(model), tracer:
            output = model(image)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor):
        raise UnitError(
            f"the model gave a {type(output).__name__}, expected one tensor of logits: wrap it so that it returns one"
        )
    trace.output = tracer.seen(output).axes
    for axis in trace.output:
        trace.axes.freeze(axis, "the model's output")


class ShapeRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation's name and the shapes of its outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        result = run(func, name, args, kwargs or {})
        shapes = tuple(tuple(item.shape) for item in _flat(result) if isinstance(item, Tensor))
        if shapes:
            self.steps.append((name, shapes))
        return result
