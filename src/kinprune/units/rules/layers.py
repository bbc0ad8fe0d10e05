"""Rules of what computes: element-wise operations, convolutions, matrix products, norms, reductions."""

from __future__ import annotations

from torch import Tensor

from kinprune.units.axes import ONE
from kinprune.units.rules.registry import Result, axes_of, grid, keep_view, rule, unknown
from kinprune.units.trace import DATA, Call, Role


@rule("pointwise", "hardswish", "copy_", "where", "native_dropout", "lerp", "masked_fill")
def pointwise(call: Call) -> Result:
    """Element by element, with broadcasting: what lies side by side is cut together."""
    tracer, tensors = call.tracer, call.tensors
    result = call.results[0]
    merged = [ONE] * result.dim()
    for tensor in tensors:
        for place, axis in enumerate(axes_of(call, tensor), start=result.dim() - tensor.dim()):
            if place < 0 or axis == ONE or tracer.axes.size(axis) == 1:
                continue
            if merged[place] == ONE:
                merged[place] = axis
            else:
                tracer.axes.unify(merged[place], axis)
    active = [tensor for tensor in tensors if tracer.seen(tensor).active]
    if call.name.removesuffix("_") in ("add", "sub") and len(active) == 2 and active[0] is not active[1]:
        _residual(call, active[0], active[1])
    if call.name.removesuffix("_") == "mul" and len(active) == 2:
        _gate(call, *sorted(active, key=lambda tensor: (tensor.numel(), not tracer.seen(tensor).squashed)))
    return [tuple(merged) for _ in call.results]


def _residual(call: Call, first: Tensor, second: Tensor) -> None:
    """Outputs of different layers are added: their axes are a residual stream."""
    tracer = call.tracer
    if tracer.seen(first).sources == tracer.seen(second).sources:
        return
    for axis in set(axes_of(call, first)) | set(axes_of(call, second)):
        for leaf in tracer.axes.leaves(axis):
            tracer.axes.facts[leaf].coupled = True
    tracer.trace.joins.add(tracer.stack[-1])
    for tensor, other in ((first, second), (second, first)):
        layer = tracer.seen(tensor).layer
        if layer is not None and call.argument(2, "alpha", 1) == 1 and tensor.shape == other.shape:
            tracer.shortcut(layer, other)


def _gate(call: Call, small: Tensor, large: Tensor) -> None:
    """Something without a grid scales a whole grid: squeeze-and-excite and its kin."""
    tracer = call.tracer
    wide = [tracer.axes.size(axis) for axis in axes_of(call, small)]
    if (small.numel() < large.numel() or tracer.seen(small).squashed) and sum(size > 1 for size in wide) == 1:
        tracer.trace.gates |= tracer.seen(small).sources


@rule("as_strided")
def restride(call: Call) -> Result:
    """The same shape laid out again in memory; anything else is not followed."""
    if call.args[0].shape == call.result.shape:
        return same(call)
    return unknown(call)


@rule("clone", "contiguous", "alias", "detach", "_to_copy", "lift_fresh", "dropout")
def same(call: Call) -> Result:
    """The same values again."""
    keep_view(call, call.args[0])
    return [axes_of(call, call.args[0])]


@rule("convolution")
def convolution(call: Call) -> Result:
    """``[n, in, ...] * [out, in / groups, k, ...]``; the groups of in and out are one axis."""
    tracer, axes = call.tracer, call.tracer.axes
    inputs, weight, bias = call.args[0], call.args[1], call.args[2]
    transposed, groups = call.args[6], call.args[8]
    x, w = axes_of(call, inputs), axes_of(call, weight)
    shape = call.result.shape
    if transposed and groups > 1:
        return unknown(call)
    if groups == 1:
        summed, made, grouping = (w[0], w[1], None) if transposed else (w[1], w[0], None)
        axes.unify(x[1], summed)
    else:
        grouping, inner = axes.reshape([x[1]], [groups, axes.size(x[1]) // groups])
        outer, _ = axes.reshape([w[0]], [groups, axes.size(w[0]) // groups])
        axes.unify(grouping, outer)
        axes.unify(inner, w[1])
        summed, made = w[1], w[0]
    if bias is not None:
        axes.unify(axes_of(call, bias)[0], made)
    name = tracer.seen(weight).weight
    if name is not None:
        tracer.trace.roles.setdefault(name, Role(made, summed))
        if grouping is not None:
            tracer.trace.groupings[name] = grouping
        call.layer, call.makes = name, True
    places = grid(call, shape[2:])
    call.macs = (x[0], *w, *(x[2:] if transposed else places))
    return [(x[0], made, *places)]


@rule("addmm", "mm", "bmm", "baddbmm")
def matmul(call: Call) -> Result:
    """Matrix products, batched or not, with an added bias or not."""
    axes = call.tracer.axes
    added = call.name in ("addmm", "baddbmm")
    left, right = call.args[1:3] if added else call.args[:2]
    a, b = axes_of(call, left), axes_of(call, right)
    for first, second in zip(a[:-2], b[:-2], strict=True):
        axes.unify(first, second)
    axes.unify(a[-1], b[-2])
    result = (*a[:-2], a[-2], b[-1])
    if added:
        for axis, other in zip(reversed(axes_of(call, call.args[0])), reversed(result), strict=False):
            if axis != ONE:
                axes.unify(axis, other)
    call.macs = (*a, b[-1])
    for tensor, made in ((right, b[-1]), (left, a[-2])):
        name = call.tracer.seen(tensor).weight
        if name is not None and not call.tracer.seen(tensor).active:
            call.tracer.trace.roles.setdefault(name, Role(made, a[-1]))
            call.layer, call.makes = name, True
            break
    return [result]


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_attention_math",
)
def attention(call: Call) -> Result:
    """Fused attention: queries and keys share their width, keys and values their length."""
    axes = call.tracer.axes
    q, k, v = (axes_of(call, call.args[index]) for index in range(3))
    for other in (k, v):
        for first, second in zip(q[:-2], other[:-2], strict=True):
            axes.unify(first, second)
    axes.unify(q[-1], k[-1])
    axes.unify(k[-2], v[-2])
    axes.freeze(k[-2], DATA)
    # Both products cost batch x heads x queries x keys x width; they are equal where values are as wide as keys.
    call.macs = (*q[:-1], k[-2], q[-1], axes.new(2, DATA))
    rest = [grid(call, item.shape) for item in call.results[1:]]
    return [(*q[:-1], v[-1]), *rest]


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm")
def batch_norm(call: Call) -> Result:
    """One affine map a channel; in training mode (weight standardisation) it mixes the other dimensions."""
    axes = call.tracer.axes
    x = axes_of(call, call.args[0])
    for tensor in call.tensors[1:]:
        axes.unify(axes_of(call, tensor)[0], x[1])
    if call.name == "native_batch_norm" and call.args[5]:
        for axis in (x[0], *x[2:]):
            _mix(call, axis)
        if not call.tracer.seen(call.args[0]).active:
            keep_view(call, call.args[0])
    rest = [(x[1],) if item.dim() == 1 and item.numel() else grid(call, item.shape) for item in call.results[1:]]
    return [x, *rest]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(call: Call) -> Result:
    """Statistics over the last dimensions."""
    axes = call.tracer.axes
    x = axes_of(call, call.args[0])
    width = len(call.args[1])
    for tensor in call.tensors[1:]:
        for axis, other in zip(axes_of(call, tensor), x[-width:], strict=True):
            axes.unify(axis, other)
    for axis in x[-width:]:
        _mix(call, axis)
    rest = [(*x[:-width], *[ONE] * width) for _ in call.results[1:]]
    return [x, *[item[: result.dim()] for item, result in zip(rest, call.results[1:], strict=True)]]


@rule("native_group_norm")
def group_norm(call: Call) -> Result:
    """Statistics over each group of channels: whole groups may go, channels inside share their statistics."""
    axes = call.tracer.axes
    x = axes_of(call, call.args[0])
    for tensor in call.tensors[1:]:
        axes.unify(axes_of(call, tensor)[0], x[1])
    groups = call.args[6]
    outer, inner = axes.reshape([x[1]], [groups, axes.size(x[1]) // groups])
    _mix(call, inner)
    weight = call.tracer.seen(call.args[1]).weight if call.args[1] is not None else None
    if weight is not None:
        call.tracer.trace.groupings[weight] = outer
    elif groups > 1:  # nowhere to note the number of groups
        axes.freeze(outer, "a group norm without weights runs over it")
    return [x, *[(x[0], outer) for _ in call.results[1:]]]


def _mix(call: Call, axis: int) -> None:
    for leaf in call.tracer.axes.leaves(axis):
        call.tracer.axes.facts[leaf].normalised = True


@rule("softmax", "_softmax", "_safe_softmax", "_log_softmax", "cumsum")
def softmax(call: Call) -> Result:
    """Every index along the dimension changes every other: none is cut."""
    axes = axes_of(call, call.args[0])
    call.tracer.axes.freeze(axes[call.argument(1, "dim")], "a softmax runs over it")
    return [axes]


@rule("mean", "sum", "amax", "amin", "linalg_vector_norm", "var", "std", "var_mean", "norm")
def reduction(call: Call) -> Result:
    """Statistics over some dimensions, which go away or stay with size one."""
    x = axes_of(call, call.args[0])
    place = 2 if call.name in ("linalg_vector_norm", "norm") else 1
    dims = call.argument(place, "dim")
    dims = range(len(x)) if dims is None else [dims] if isinstance(dims, int) else dims
    reduced = {dim % len(x) for dim in dims}
    for dim in reduced:
        _mix(call, x[dim])
    keeps = call.results[0].dim() == len(x)
    kept = tuple(ONE if dim in reduced else axis for dim, axis in enumerate(x) if keeps or dim not in reduced)
    return [kept for _ in call.results]
