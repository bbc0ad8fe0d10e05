from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kinprune.units.modes import evaluating, forget


class Remembering(nn.Module):
    """Keeps twice its weight between forward passes in eval mode, as LeViT keeps its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.kept: Tensor | None = None

    def train(self, mode: bool = True) -> Remembering:
        super().train(mode)
        self.kept = None if mode else self.kept
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * (2 * self.weight)
        if self.kept is None:
            self.kept = 2 * self.weight
        return x * self.kept


def model_of_modes(modes: list[bool]) -> nn.Sequential:
    model = nn.Sequential(*[Remembering() for _ in modes])
    for module, mode in zip(model, modes, strict=True):
        module.train(mode)
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_is_in_eval_mode_inside_and_in_its_own_afterwards(fails: bool) -> None:
    model = model_of_modes([True, False, True])
    modes = [module.training for module in model.modules()]
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [module.training for module in model.modules()] == modes


def test_what_was_remembered_before_is_not_used_inside_and_nothing_is_afterwards() -> None:
    model = model_of_modes([False])
    x = torch.ones(1)
    assert model(x).item() == 2
    with torch.no_grad():
        model[0].weight.fill_(5)
    assert model(x).item() == 2  # the module's own doing
    with evaluating(model):
        assert model(x).item() == 10
    assert model[0].kept is None


def test_forgetting_changes_no_mode() -> None:
    model = model_of_modes([False, True])
    model[0](torch.ones(1))
    forget(model)
    assert model[0].kept is None
    assert [module.training for module in model] == [False, True]
