"""Rules by operation name, and what rules are written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from kinprune.units.trace import DATA, Call

Result = list[tuple[int, ...]]
RULES: dict[str, Callable[[Call], Result]] = {}


def rule(*names: str) -> Callable[[Callable[[Call], Result]], Callable[[Call], Result]]:
    """Register a rule for operations by their ATen names (in-place forms share it)."""

    def register(function: Callable[[Call], Result]) -> Callable[[Call], Result]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def axes_of(call: Call, tensor: Tensor) -> tuple[int, ...]:
    """The axes of a tensor that a call is given."""
    return call.tracer.seen(tensor).axes


def keep_view(call: Call, tensor: Tensor) -> None:
    """A view of a weight is still that weight; a view of what a layer gave is still what it gave."""
    seen = call.tracer.seen(tensor)
    call.weight, call.layer = seen.weight, seen.layer


def grid(call: Call, shape: Sequence[int]) -> tuple[int, ...]:
    """Fresh axes that nothing may cut."""
    return tuple(call.tracer.axes.new(size, DATA) for size in shape)


@rule("unknown")
def unknown(call: Call) -> Result:
    """An operation without a rule: nothing that it touches is cut."""
    reason = f"the operation {call.name} is not understood"
    for tensor in call.tensors:
        for axis in axes_of(call, tensor):
            call.tracer.axes.freeze(axis, reason)
    return [tuple(call.tracer.axes.new(size, reason) for size in item.shape) for item in call.results]
