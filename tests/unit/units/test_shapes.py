"""Running by shape alone must give what PyTorch gives on the meta device, and refuse what PyTorch refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kinprune.units.shapes import run

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def channels_last(*shape: int) -> Tensor:
    return meta(*shape).to(memory_format=torch.channels_last)


def name_of(func: Any) -> str:
    return str(func._schema.name).removeprefix("aten::")


def described(value: Any) -> list[Any]:
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return [(tuple(item.shape), item.dtype, item.stride(), item.device) for item in tensors]


WELL_FORMED = [
    (aten.add.Tensor, (meta(2, 3, 4), meta(2, 3, 4)), {}),
    (aten.add.Tensor, (meta(2, 3, 4), meta(2, 3, 4)), {"alpha": 2}),
    (aten.add.Tensor, (meta(2, 3, 4), meta(4)), {}),
    (aten.add.Tensor, (meta(4), meta(2, 3, 4)), {}),
    (aten.add.Tensor, (meta(2, 1, 4), meta(1, 3, 4)), {}),
    (aten.add.Tensor, (meta(2, 3), meta(2, 3, dtype=torch.float64)), {}),
    (aten.add.Tensor, (meta(2, 3, dtype=torch.int64), 1.5), {}),
    (aten.add.Tensor, (meta(2, 3).t(), meta(3, 2)), {}),
    (aten.add.Tensor, (channels_last(2, 3, 4, 5), channels_last(2, 3, 4, 5)), {}),
    (aten.mul.Tensor, (meta(2, 3), 2.0), {}),
    (aten.mul.Tensor, (meta(2, 3, dtype=torch.float16), 2), {}),
    (aten.div.Tensor, (meta(2, 3), meta(2, 3)), {}),
    (aten.div.Tensor_mode, (meta(2, 3), meta(2, 3)), {"rounding_mode": "floor"}),
    (aten.gelu.default, (meta(2, 5),), {"approximate": "tanh"}),
    (aten.relu.default, (meta(2, 5).t(),), {}),
    (aten.relu.default, (meta(1, 5).expand(3, 5),), {}),
    (aten.sigmoid.default, (meta(2, 5, dtype=torch.int64),), {}),
    (aten.hardtanh.default, (meta(2, 5), 0.0, 6.0), {}),
    (aten._softmax.default, (meta(2, 3, 4), -1, False), {}),
    (aten._softmax.default, (meta(2, 3, 4).transpose(1, 2), -1, False), {}),
    (aten._softmax.default, (meta(2, 3, dtype=torch.float16), -1, False), {}),
    (aten.addmm.default, (meta(5), meta(2, 3), meta(3, 5)), {}),
    (aten.addmm.default, (meta(2, 5), meta(2, 3), meta(3, 5)), {}),
    (aten.addmm.default, (meta(1), meta(2, 3), meta(3, 5)), {}),
    (aten.addmm.default, (meta(5), meta(2, 3), meta(3, 5)), {"beta": 0.5}),
    (aten.native_layer_norm.default, (meta(2, 7, 4), [4], meta(4), meta(4), 1e-5), {}),
    (aten.native_layer_norm.default, (meta(2, 7, 4), [7, 4], None, None, 1e-5), {}),
    (aten.native_layer_norm.default, (meta(2, 4, 7).transpose(1, 2), [4], meta(4), meta(4), 1e-5), {}),
    (aten.cat.default, ([meta(2, 3), meta(2, 4)], 1), {}),
    (aten.cat.default, ([meta(2, 3), meta(2, 4)], -1), {}),
    (aten.cat.default, ([meta(2, 3), meta(5, 3)],), {}),
    (aten.cat.default, ([meta(2, 3), meta(2, 4, dtype=torch.float64)], 1), {}),
    (aten.cat.default, ([meta(3, 2).t(), meta(2, 4)], 1), {}),
    (aten.cat.default, ([meta(0), meta(2, 4)], 1), {}),
    (aten.cat.default, ([channels_last(2, 3, 4, 5), channels_last(2, 3, 4, 5)], 1), {}),
    (aten.cat.default, ([meta(3), meta(4)],), {}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), WELL_FORMED, ids=lambda item: getattr(item, "__name__", None))
def test_the_answer_is_that_of_pytorch(func: Any, args: Any, kwargs: Any) -> None:
    assert described(run(func, name_of(func), args, kwargs)) == described(func(*args, **kwargs))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_gives_its_output_as_pytorch_does(training: bool, affine: bool) -> None:
    weight = meta(3) if affine else None
    args = (meta(2, 3, 4, 5), weight, weight, meta(3), meta(3), training, 0.1, 1e-5)
    func = aten.native_batch_norm.default
    found, expected = run(func, "native_batch_norm", args, {}), func(*args)
    assert len(found) == len(expected) == 3
    assert described(found[0]) == described(expected[0])


def test_an_operation_in_place_gives_its_own_input() -> None:
    x = meta(2, 3)
    assert run(aten.relu_.default, "relu_", (x,), {}) is x
    assert run(aten.add_.Tensor, "add_", (x, meta(2, 3)), {}) is x
    assert run(aten.add_.Tensor, "add_", (x, meta(3)), {}) is x


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.add.Tensor, (meta(2, 3), meta(2, 4))),
        (aten.add_.Tensor, (meta(3), meta(2, 3))),
        (aten.addmm.default, (meta(5), meta(2, 3), meta(4, 5))),
        (aten.addmm.default, (meta(4), meta(2, 3), meta(3, 5))),
        (aten.native_layer_norm.default, (meta(2, 7, 4), [5], meta(5), meta(5), 1e-5)),
        (aten.native_layer_norm.default, (meta(2, 7, 4), [4], meta(5), meta(5), 1e-5)),
        (aten.cat.default, ([meta(2, 3), meta(3, 4)], 1)),
        (aten.cat.default, ([meta(2, 3), meta(2, 3, 1)], 1)),
        (aten.cat.default, ([meta(2, 3), meta(2, 3)], 2)),
    ],
    ids=lambda item: getattr(item, "__name__", None),
)
def test_what_pytorch_refuses_is_refused(func: Any, args: Any) -> None:
    with pytest.raises((RuntimeError, IndexError, ValueError)) as theirs:
        func(*args)
    with pytest.raises(type(theirs.value)):
        run(func, name_of(func), args, {})


def test_real_tensors_are_computed() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert run(aten.add.Tensor, "add", (a, b), {}).tolist() == [4, 6]
    assert run(aten.cat.default, "cat", ([a[None], b[None]], 0), {}).tolist() == [[1, 2], [3, 4]]
