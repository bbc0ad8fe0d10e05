"""Copies of modules around other tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn


def copy_around(model: nn.Module, tensors: dict[int, Any]) -> nn.Module:
    """A deep copy of ``model`` that holds ``tensors[id(tensor)]`` for each of its tensors that are named there."""
    memo: dict[int, Any] = dict(tensors)
    for module in model.modules():
        for value in vars(module).values():
            # Each module has a dozen empty dictionaries of hooks, which take deepcopy half of its time.
            if not value and type(value) in (dict, OrderedDict, set):
                memo[id(value)] = type(value)()
    return copy.deepcopy(model, memo)
