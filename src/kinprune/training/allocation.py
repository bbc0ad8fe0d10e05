"""How much memory a computation's tensors take at their peak, counted as they come and go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def live_peak(compute: Callable[[], object]) -> int:
    """The most bytes that tensors made by ``compute`` take at one time; those that were there before do not count.

    Every operation is seen with its outputs, those of the backward pass included, and every storage until nothing
    holds it: what autograd saves as well as what is passing. What an operation takes inside itself is not seen: a
    convolution or matrix product is taken to lay out anew all that it reads and makes, as oneDNN does at worst. Tensors
    of shapes alone (``FakeTensorMode``) count as those that they stand for.
    """
    live = _Live()
    with live:
        compute()
    return live.peak


_LAID_OUT = ("convolution", "linear", "mm", "attention")
"""Parts of the names of operations that lay out their inputs and outputs in ways of their own."""


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    found = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in found}


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, from the operation until nothing holds them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.total = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        # A result in place or a view lives in what was there before.
        given = _storages((args, kwargs))
        result = func(*args, **kwargs)
        made = _storages(result)
        for key in made.keys() - given.keys():
            self.add(made[key])
        if any(word in func.__name__ for word in _LAID_OUT):
            inside = sum(storage.nbytes() for storage in {**given, **made}.values())
            self.peak = max(self.peak, self.total + inside)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.total += storage.nbytes()
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self.free, key).atexit = False

    def free(self, key: int) -> None:
        self.total -= self.alive.pop(key, 0)
