"""The classifier solved in closed form on a model's own features: ridge regression or class means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kinprune.errors import TaskError, TrainingError
from kinprune.evaluation import at_once, device_of, eval_mode, in_batches
from kinprune.preprocessing import Preprocessing, normalise

HeadMethod = Literal["ridge", "class-mean"]

RIDGES = tuple(10.0**exponent for exponent in (-6, -5, -4, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 2))
"""Candidate penalties, as shares of the features' largest squared singular value."""
SURE = 2.0
"""Standard errors of a mean that chance alone seldom exceeds."""
LONE_RIDGE = 0.1
"""The penalty where every class has a single image, so that leaving one out says nothing."""
LONE_INVERSE_TEMPERATURE = 10.0
"""The scale of the logits in the same case."""


@dataclass(frozen=True)
class HeadSolution:
    """How a head was solved.

    ``ridge`` is the penalty as a share of the largest squared singular value (None for class means), ``temperature``
    what the scores were divided by to become logits. ``accuracy`` and ``loss`` are leave-one-out estimates, balanced
    over the classes with at least two images; None where there is no such class. ``losses`` are those of each image of
    these classes, float64 ``[m]``.
    """

    method: HeadMethod
    ridge: float | None
    temperature: float
    accuracy: float | None
    loss: float | None
    images: int
    losses: Tensor = field(compare=False, repr=False)

    def surely_beats(self, other: HeadSolution) -> bool:
        """Whether it answers the same images better than another, by more than ``SURE`` standard errors."""
        gains = other.losses - self.losses
        return len(gains) > 1 and float(gains.mean()) > SURE * float(gains.std()) / math.sqrt(len(gains))


@torch.no_grad()
def solve_head(
    model: nn.Module,
    head: str,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    preprocessing: Preprocessing,
    *,
    method: HeadMethod = "ridge",
    ridges: Sequence[float] = RIDGES,
    batch_size: int | None = None,
) -> HeadSolution:
    """Write a closed-form classifier into the Linear named ``head``, from its own inputs on ``images``.

    ``images`` are uint8 ``[n, 3, h, w]`` and ``labels`` int64 ``[n]`` in ``0..num_classes-1``. Every class weighs the
    same, whatever its number of images. *ridge* regresses one-hot targets with an unpenalised intercept, its penalty
    chosen among ``ridges`` by leave-one-out; *class-mean* is the nearest plain (Euclidean) class mean written as a
    linear layer. Either way the scores are then divided by the temperature of least leave-one-out cross-entropy.
    A head of another width is given ``num_classes`` outputs. Raises TaskError for bad labels, TrainingError for a
    head that is not a Linear over flat, finite features.
    """
    _linear(model, head, method)
    check_labels(images, labels, num_classes)
    if method == "ridge" and (not ridges or min(ridges) <= 0):
        raise TrainingError(f"ridges are {tuple(ridges)}; expected at least one penalty above 0")
    features = head_inputs(model, head, images, preprocessing, batch_size=batch_size)
    return fit_head(model, head, features, labels, num_classes, method=method, ridges=ridges)


@torch.no_grad()
def fit_head(
    model: nn.Module,
    head: str,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    method: HeadMethod = "ridge",
    ridges: Sequence[float] = RIDGES,
) -> HeadSolution:
    """Do what ``solve_head`` does where the head's inputs are known already: ``features`` float64 ``[n, d]``."""
    layer = _linear(model, head, method)
    labels = labels.cpu()
    weight, bias, solution = (
        ridge_head(features, labels, num_classes, ridges, intercept=layer.bias is not None)
        if method == "ridge"
        else class_mean_head(features, labels, num_classes)
    )
    _write(model, layer, weight, bias)
    return solution


@torch.no_grad()
def head_inputs(
    model: nn.Module, head: str, images: Tensor, preprocessing: Preprocessing, *, batch_size: int | None = None
) -> Tensor:
    """What the Linear named ``head`` is given for ``uint8 [n, 3, h, w]`` images: float64 ``[n, d]`` on the CPU."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().to("cpu", torch.float64))

    handle = model.get_submodule(head).register_forward_pre_hook(keep)
    device = device_of(model)
    try:
        with eval_mode(model):
            for batch in in_batches(images, batch_size or at_once(device)):
                model(normalise(batch.to(device), preprocessing))
    finally:
        handle.remove()
    features = torch.cat(seen) if seen else torch.empty(0)
    if features.ndim != 2 or len(features) != len(images):
        raise TrainingError(
            f"the head {head!r} is given inputs {list(features.shape)} for {len(images)} images; "
            "expected one flat vector an image: name the model's last classifier"
        )
    if not bool(features.isfinite().all()):
        raise TrainingError(
            f"the features before {head!r} are not finite; expected finite numbers: "
            "check the model's weights, or re-estimate its batch norm first"
        )
    return features


def ridge_head(
    features: Tensor, labels: Tensor, num_classes: int, ridges: Sequence[float] = RIDGES, *, intercept: bool = True
) -> tuple[Tensor, Tensor, HeadSolution]:
    """Class-balanced ridge regression of one-hot targets: float64 ``[n, d]`` to weight ``[k, d]`` and bias ``[k]``.

    Minimises sum_i w_i |y_i - W x_i - b|^2 + ridge * s_max^2 |W|^2. With the hat matrix H of the weighted, centred
    problem the residual of an image left out is r_i / (1 - H_ii) (Allen's PRESS), so one eigen-decomposition, of the
    smaller of ``X X'`` and ``X' X``, prices every penalty.
    """
    targets = functional.one_hot(labels, num_classes).to(torch.float64)
    weights = balanced_weights(labels, num_classes)
    shares = (weights / weights.sum()).unsqueeze(1)
    means = (shares * features).sum(0) if intercept else features.new_zeros(features.shape[1])
    offset = (shares * targets).sum(0) if intercept else targets.new_zeros(num_classes)
    root = weights.sqrt().unsqueeze(1)
    left, squares, right = _decompose(root * (features - means))
    projected = left.T @ (root * (targets - offset))
    lone = _lone(labels, num_classes)
    candidates = (LONE_RIDGE,) if bool(lone.all()) else tuple(ridges)
    top = float(squares.max()) if len(squares) and float(squares.max()) > 0 else 1.0
    best: tuple[float, float, float, Tensor] | None = None
    for ridge in candidates:
        shrink = squares / (squares + ridge * top)
        fitted = left @ (shrink.unsqueeze(1) * projected) / root + offset
        hat = (left.square() * shrink).sum(1, keepdim=True) + (shares if intercept else 0)
        left_out = targets - (targets - fitted) / (1 - hat).clamp_min(1e-12)
        inverse, loss = best_inverse_temperature(left_out[~lone], labels[~lone], weights[~lone])
        if best is None or loss < best[0]:
            best = (loss, ridge, inverse, left_out)
    assert best is not None
    loss, ridge, inverse, left_out = best
    coefficients = right @ (projected * (squares.sqrt() / (squares + ridge * top)).unsqueeze(1))
    weight, bias = inverse * coefficients.T, inverse * (offset - means @ coefficients)
    return weight, bias, _solution("ridge", ridge, inverse, loss, left_out, labels, weights, lone)


def class_mean_head(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, HeadSolution]:
    """The nearest class mean as a linear layer: the score of c is m_c.x - |m_c|^2 / 2; classes without images get 0.

    Left out of its class of n images, an image's squared distance to its own mean grows by (n / (n - 1))^2.
    """
    counts = torch.bincount(labels, minlength=num_classes).to(torch.float64)
    empty = counts == 0
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64).index_add_(0, labels, features)
    means = sums / counts.clamp_min(1).unsqueeze(1)
    centre = means[~empty].mean(0)
    means = torch.where(empty.unsqueeze(1), 0.0, means - centre)
    norms = means.square().sum(1)
    # The m_c sum to 0, so some class scores at least -max |m_c|^2 / 2: twice that never wins.
    biases = torch.where(empty, -norms.max(), -0.5 * norms)
    scores = (features - centre) @ means.T + biases
    own, index = counts[labels], torch.arange(len(labels))
    lone = own < 2
    distances = (features - centre - means[labels]).square().sum(1)
    left_out = scores.clone()
    left_out[index, labels] -= 0.5 * distances * ((own / (own - 1).clamp_min(1)).square() - 1)
    weights = balanced_weights(labels, num_classes)
    scale = float(norms.max()) or 1.0
    inverse, loss = best_inverse_temperature(left_out[~lone] / scale, labels[~lone], weights[~lone])
    inverse /= scale
    weight, bias = inverse * means, inverse * (biases - means @ centre)
    return weight, bias, _solution("class-mean", None, inverse, loss, left_out, labels, weights, lone)


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """A weight an image, float64 ``[n]``, mean 1, with the same sum for every class that has images."""
    counts = torch.bincount(labels, minlength=num_classes).to(torch.float64)
    return len(labels) / ((counts > 0).sum() * counts[labels])


def best_inverse_temperature(scores: Tensor, labels: Tensor, weights: Tensor) -> tuple[float, float]:
    """The b > 0 of least weighted cross-entropy of softmax(b * scores), and that cross-entropy.

    The cross-entropy is convex in b, so its derivative, E_p[score] - score of the true class, is bisected, on b from
    1 to 1000: less would all but erase a head that answers by chance, and no training could start from it. Truth is
    smoothed by 1 / (n + 2), as in Platt scaling, or n images all answered rightly would ask for an endless b.
    Without scores: a fixed scale and an infinite loss.
    """
    if len(scores) == 0:
        return LONE_INVERSE_TEMPERATURE, float("inf")
    shares = weights / weights.sum()
    doubt = 1 / (len(scores) + 2)
    truth = (1 - doubt) * scores.gather(1, labels.unsqueeze(1)).squeeze(1) + doubt * scores.mean(1)
    low, high = 0.0, 3.0
    for _ in range(30):
        middle = (low + high) / 2
        expected = ((10**middle * scores).softmax(1) * scores).sum(1)
        if float((shares * (expected - truth)).sum()) < 0:
            low = middle
        else:
            high = middle
    inverse = 10 ** ((low + high) / 2)
    losses = functional.cross_entropy(inverse * scores, labels, reduction="none")
    return inverse, float((shares * losses).sum())


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD through the smaller Gram matrix: left ``[n, r]``, squared singular values ``[r]``, right ``[d, r]``."""
    n, d = matrix.shape
    if n < d:
        squares, left = torch.linalg.eigh(matrix @ matrix.T)
    else:
        squares, right = torch.linalg.eigh(matrix.T @ matrix)
    # Directions below the rounding of the Gram matrix carry noise only; dividing by them would blow it up.
    kept = squares > squares.max().clamp_min(0) * max(n, d) * torch.finfo(matrix.dtype).eps
    squares = squares[kept]
    if n < d:
        left = left[:, kept]
        return left, squares, matrix.T @ left / squares.sqrt()
    right = right[:, kept]
    return matrix @ right / squares.sqrt(), squares, right


def _lone(labels: Tensor, num_classes: int) -> Tensor:
    """Which images are the only one of their class, bool ``[n]``."""
    return torch.bincount(labels, minlength=num_classes)[labels] < 2


def _solution(
    method: HeadMethod,
    ridge: float | None,
    inverse: float,
    loss: float,
    left_out: Tensor,
    labels: Tensor,
    weights: Tensor,
    lone: Tensor,
) -> HeadSolution:
    accuracy = None
    if not bool(lone.all()):
        right = (left_out.argmax(1) == labels)[~lone].to(torch.float64)
        accuracy = float((right * weights[~lone]).sum() / weights[~lone].sum())
    return HeadSolution(
        method=method,
        ridge=ridge,
        temperature=1 / inverse,
        accuracy=accuracy,
        loss=None if accuracy is None else loss,
        images=len(labels),
        losses=functional.cross_entropy(inverse * left_out[~lone], labels[~lone], reduction="none"),
    )


def _linear(model: nn.Module, head: str, method: str) -> nn.Linear:
    if method not in ("ridge", "class-mean"):
        raise TrainingError(f"the head's method is {method!r}; expected 'ridge' or 'class-mean'")
    try:
        layer = model.get_submodule(head)
    except AttributeError as error:
        raise TrainingError(
            f"the model has no module {head!r}; expected the dotted name of its classifier, such as 'fc' or 'head.fc'"
        ) from error
    if not isinstance(layer, nn.Linear):
        raise TrainingError(
            f"the head {head!r} is a {type(layer).__name__}; expected a Linear: "
            "build the model with a number of classes, or name its classifier"
        )
    if method == "class-mean" and layer.bias is None:
        raise TrainingError(f"the head {head!r} has no bias, which class means need; use method 'ridge'")
    return layer


def check_labels(images: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raises TaskError without images, with another number of labels, or for a label that is no class."""
    if len(images) == 0 or len(images) != len(labels):
        raise TaskError(
            f"{len(images)} images and {len(labels)} labels were given; expected as many of both, at least one"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise TaskError(
            f"labels run from {lowest} to {highest}; expected 0 to {num_classes - 1}: correct num_classes or the labels"
        )


def _write(model: nn.Module, layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    if layer.out_features != len(weight):
        layer.weight = nn.Parameter(layer.weight.new_empty(weight.shape))
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.new_empty(bias.shape))
        layer.out_features = len(weight)
        if isinstance(getattr(model, "num_classes", None), int):
            setattr(model, "num_classes", len(weight))  # noqa: B010 - torch types attributes as tensors and modules
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)
