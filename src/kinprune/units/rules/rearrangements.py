"""Rules of what moves values about: reshapes, slices, concatenations, pooling, and fresh tensors."""

from __future__ import annotations

from kinprune.units.axes import ONE
from kinprune.units.rules.registry import Result, axes_of, grid, keep_view, rule, unknown
from kinprune.units.trace import DATA, Call


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze")
def reshape(call: Call) -> Result:
    """Row-major reshapes, dimensions of size one coming and going among them."""
    keep_view(call, call.args[0])
    return [tuple(call.tracer.axes.reshape(axes_of(call, call.args[0]), call.result.shape))]


@rule("permute")
def permute(call: Call) -> Result:
    """Dimensions in another order."""
    keep_view(call, call.args[0])
    axes = axes_of(call, call.args[0])
    return [tuple(axes[dim] for dim in call.args[1])]


@rule("t", "transpose")
def transpose(call: Call) -> Result:
    """Two dimensions change places."""
    keep_view(call, call.args[0])
    axes = list(axes_of(call, call.args[0]))
    if len(axes) > 1:
        first, second = (0, 1) if call.name == "t" else (call.args[1], call.args[2])
        axes[first], axes[second] = axes[second], axes[first]
    return [tuple(axes)]


@rule("expand", "repeat")
def expand(call: Call) -> Result:
    """Dimensions of size one become copies; others stay, unless they are tiled."""
    axes = call.tracer.axes
    x = axes_of(call, call.args[0])
    shape = call.result.shape
    padded = [ONE] * (len(shape) - len(x)) + list(x)
    for place, size in enumerate(shape):
        if axes.size(padded[place]) != size:
            axes.freeze(padded[place], "it is repeated")
            padded[place] = axes.new(size, None if padded[place] == ONE else DATA)
    return [tuple(padded)]


@rule("slice", "narrow")
def take_slice(call: Call) -> Result:
    """A stretch of one dimension: whole segments keep their axes, anything else is frozen."""
    axes = call.tracer.axes
    x = list(axes_of(call, call.args[0]))
    dim = call.argument(1, "dim", 0) % len(x)
    size = axes.size(x[dim])
    if call.name == "slice":
        start, stop, step = call.argument(2, "start"), call.argument(3, "end"), call.argument(4, "step", 1)
        start, stop, _ = slice(start, stop).indices(size)
    else:
        start, step = call.args[2], 1
        stop = start + call.args[3]
    x[dim] = _stretch(call, x[dim], start, stop) if step == 1 else _lose(call, x[dim], call.result.shape[dim])
    return [tuple(x)]


def _stretch(call: Call, axis: int, start: int, stop: int) -> int:
    axes = call.tracer.axes
    if axes.is_fixed(axis):
        return axis if stop - start == axes.size(axis) else axes.new(stop - start, DATA)
    found = axes.slice(axis, start, stop)
    return _lose(call, axis, stop - start) if found is None else found


def _lose(call: Call, axis: int, size: int) -> int:
    call.tracer.axes.freeze(axis, f"the operation {call.name} picks single indices of it")
    return call.tracer.axes.new(size, DATA)


@rule("split", "split_with_sizes", "chunk", "unbind")
def split(call: Call) -> Result:
    """One dimension in pieces; ``unbind`` takes it apart."""
    x = axes_of(call, call.args[0])
    dim = call.argument(2 if call.name != "unbind" else 1, "dim", 0) % len(x)
    if call.name == "unbind":
        call.tracer.axes.freeze(x[dim], "it is unbound")
        return [x[:dim] + x[dim + 1 :] for _ in call.results]
    pieces, start = [], 0
    for item in call.results:
        stop = start + item.shape[dim]
        pieces.append((*x[:dim], _stretch(call, x[dim], start, stop), *x[dim + 1 :]))
        start = stop
    return pieces


@rule("select")
def select(call: Call) -> Result:
    """One index of a dimension."""
    x = axes_of(call, call.args[0])
    dim = call.args[1] % len(x)
    call.tracer.axes.freeze(x[dim], "a single index of it is picked")
    return [x[:dim] + x[dim + 1 :]]


@rule("cat", "stack")
def concatenate(call: Call) -> Result:
    """Pieces side by side along one dimension; all others are shared."""
    axes = call.tracer.axes
    pieces = [axes_of(call, tensor) for tensor in call.args[0] if tensor.numel()]
    dim = call.argument(1, "dim", 0) % call.result.dim()
    if call.name == "stack":
        pieces = [(*piece[:dim], ONE, *piece[dim:]) for piece in pieces]
    for piece in pieces[1:]:
        for place, (axis, other) in enumerate(zip(pieces[0], piece, strict=True)):
            if place != dim:
                axes.unify(axis, other)
    whole = axes.sum([piece[dim] for piece in pieces])
    return [(*pieces[0][:dim], whole, *pieces[0][dim + 1 :])]


@rule("roll", "flip")
def roll(call: Call) -> Result:
    """Indices change places along some dimensions."""
    x = list(axes_of(call, call.args[0]))
    dims = call.argument(2 if call.name == "roll" else 1, "dims", ())
    for dim in dims or range(len(x)):
        call.tracer.axes.freeze(x[dim], DATA)
    return [tuple(x)]


@rule("index", "gather", "index_select", "take_along_dim")
def index(call: Call) -> Result:
    """Indices picked by a tensor: the indexed dimensions are fixed, the others pass (one leading run of them)."""
    if call.name != "index":
        return unknown(call)
    axes, indices = call.tracer.axes, call.args[1]
    x = axes_of(call, call.args[0])
    places = [place for place, item in enumerate(indices) if item is not None]
    if places != list(range(places[0], places[0] + len(places))):
        return unknown(call)
    for place in places:
        axes.freeze(x[place], f"the operation {call.name} picks single indices of it")
    for item in (item for item in indices if item is not None):
        for axis in axes_of(call, item):
            axes.freeze(axis, DATA)
    width = call.result.dim() - (len(x) - len(places))
    first = places[0]
    middle = grid(call, call.result.shape[first : first + width])
    return [(*x[:first], *middle, *x[first + len(places) :])]


@rule("constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def pad(call: Call) -> Result:
    """Padded dimensions are the grid's; the others pass."""
    x = axes_of(call, call.args[0])
    shape, old = call.result.shape, call.args[0].shape
    return [
        tuple(
            axis if size == before else _lose(call, axis, size)
            for axis, size, before in zip(x, shape, old, strict=True)
        )
    ]


@rule(
    "max_pool2d_with_indices",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "_adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_nearest1d",
    "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
    "avg_pool1d",
)
def pool(call: Call) -> Result:
    """Channel by channel over the grid."""
    x = axes_of(call, call.args[0])
    keep = 1 if call.args[0].dim() == 3 and "2d" in call.name else 2
    return [(*x[:keep], *grid(call, item.shape[keep:])) for item in call.results]


@rule("fill", "zero", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "bernoulli")
def fresh(call: Call) -> Result:
    """Values that do not depend on any input, in a given shape."""
    tensors = call.tensors
    if tensors and tensors[0].shape == call.result.shape:
        return [axes_of(call, tensors[0])]
    return [grid(call, item.shape) for item in call.results]


@rule("empty", "arange", "zeros", "ones", "full", "linspace", "scalar_tensor", "new_empty", "eye")
def made(call: Call) -> Result:
    """Fresh tensors of a given shape."""
    return [grid(call, item.shape) for item in call.results]
