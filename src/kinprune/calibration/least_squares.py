"""Ridge regression from moments: rows are met once, a batch at a time, and never held together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows (x, y), float64: count, x ``[d]``, y ``[o]``, xx' ``[d, d]``, xy' ``[d, o]``, |y|^2."""

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    squares: float

    @staticmethod
    def zero(inputs: int, outputs: int, device: torch.device) -> Moments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return Moments(0, zeros(inputs), zeros(outputs), zeros(inputs, inputs), zeros(inputs, outputs), 0.0)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.squares + other.squares,
        )


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """``weight [o, d]`` and ``bias [o]`` with the squared error they leave on the rows, and the ridge chosen."""

    weight: Tensor
    bias: Tensor
    error: float
    ridge: float


def moments_of(x: Tensor, y: Tensor) -> Moments:
    """The moments of rows ``x [m, d]`` and ``y [m, o]``, both float64."""
    return Moments(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, float(y.square().sum()))


def solve_towards_zero(halves: tuple[Moments, Moments], ridges: Sequence[float], *, intercept: bool) -> RidgeFit | str:
    """Regress y on x with a ridge towards zero; the reason as text where leaving zero does not pay.

    The ridge, a share of the mean variance of x, is the one of least error when each half is fitted and the other
    tested; y = 0 is a candidate. The fit returned is on both halves and its error never exceeds that of y = 0.
    """
    first, second = halves
    whole = first + second
    if not first.count or not second.count:
        return "it needs at least two images to be tested on"
    if not bool(whole.xx.isfinite().all() and whole.xy.isfinite().all()):
        return "its inputs or outputs are not finite"
    if float(whole.xx.diagonal().sum()) == 0:
        return "its inputs are all zero"
    halved = _Normal.of(first, intercept), _Normal.of(second, intercept)
    tested = {
        ridge: squared_error(second, *halved[0].solve(ridge)) + squared_error(first, *halved[1].solve(ridge))
        for ridge in ridges
    }
    ridge = min(tested, key=lambda candidate: (tested[candidate], -candidate))
    if not tested[ridge] < whole.squares:
        return "no ridge lessens its error on images left out"
    weight, bias = _Normal.of(whole, intercept).solve(ridge)
    error = squared_error(whole, weight, bias)
    if not error <= whole.squares:
        return "its equations are too badly conditioned"
    return RidgeFit(weight.T, bias, error, ridge)


@dataclass(frozen=True, eq=False)
class _Normal:
    """The normal equations of a ridge regression, for any ridge: centred where an intercept, unpenalised, is fitted."""

    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    spread: float
    floor: float
    intercept: bool

    @classmethod
    def of(cls, moments: Moments, intercept: bool) -> _Normal:
        mean_x, mean_y = moments.x / moments.count, moments.y / moments.count
        xx, xy = moments.xx, moments.xy
        if intercept:
            xx = xx - moments.count * torch.outer(mean_x, mean_x)
            xy = xy - moments.count * torch.outer(mean_x, mean_y)
        # Rounding may leave a constant input a variance just below 0: a floor keeps the matrix positive definite.
        floor = 1e-12 * float(moments.xx.diagonal().mean())
        return cls(mean_x, mean_y, xx, xy, float(xx.diagonal().mean()), floor, intercept)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Coefficients ``[d, o]`` and intercept ``[o]``."""
        penalty = max(ridge * self.spread, self.floor) or 1.0  # inputs that are all 0: so are the coefficients
        penalised = self.xx.clone()
        penalised.diagonal().add_(penalty)
        coefficients = torch.cholesky_solve(self.xy, torch.linalg.cholesky(penalised))
        offset = self.mean_y - self.mean_x @ coefficients if self.intercept else torch.zeros_like(self.mean_y)
        return coefficients, offset


def squared_error(moments: Moments, coefficients: Tensor, offset: Tensor) -> float:
    """Sum of |y - x C - b|^2 over the rows, from their moments."""
    fitted = moments.xx @ coefficients
    quadratic = (coefficients * fitted).sum() - 2 * (coefficients * moments.xy).sum()
    linear = 2 * (offset * (moments.x @ coefficients)).sum() - 2 * (offset * moments.y).sum()
    # Rounding may take an error of nothing just below 0.
    return max(0.0, float(quadratic + linear + moments.count * offset.square().sum()) + moments.squares)
