"""LEEP, NCE and N-LEEP: how surely a source's answers on the target's images tell the target's labels."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from kinprune.transferability.inputs import Features, Labels, Scores

ENERGY = 0.8
"""The share of the variance that N-LEEP's principal components keep (Li et al. 2021)."""

STEPS = 5
"""Steps of expectation-maximisation for N-LEEP's mixtures."""

LEAST_VARIANCE = 1e-2
"""What is added to the variances of N-LEEP's components, in parts of the whole's."""


def leep(logits: Features, starts: Labels) -> Scores:
    """LEEP (Nguyen et al. 2020) of ``logits [k, c, n]``: mean log of the expected empirical prediction, nats, <= 0.

    ``1/n sum_i log sum_z P(y_i|z) theta_z(x_i)`` with ``P(y, z) = 1/n sum_{i: y_i = y} theta_z(x_i)`` and theta the
    probe's softmax.
    """
    return _expected_prediction(softmax(logits), starts)


def nce(logits: Features, starts: Labels) -> Scores:
    """NCE (Tran et al. 2019): ``-H(Y|Z)`` in nats, Z the probe's most probable class (the first of equals)."""
    tasks, classes, images = logits.shape
    kinds = len(starts) - 1
    answers = _most_probable(logits)
    labels = np.repeat(np.arange(kinds), np.diff(starts))
    codes = (np.arange(tasks)[:, None] * classes + answers) * kinds + labels
    joint = np.bincount(codes.ravel(), minlength=tasks * classes * kinds).reshape(tasks, classes, kinds) / images
    marginal = joint.sum(axis=2, keepdims=True)
    told = np.log(np.where(joint > 0, joint, 1) / np.where(joint > 0, marginal, 1))
    return np.asarray((joint * told).sum(axis=(1, 2)))


def n_leep(logits: Features, starts: Labels) -> Scores:
    """N-LEEP (Li et al. 2021): LEEP with the posteriors of a Gaussian mixture in place of the probe's softmax.

    The paper fits principal components and a mixture to the features of each source model. Here all sources share the
    backbone, so a source's representation is its probe's logits, less their mean over classes (which softmax does not
    see). These are our choices: the mixture has a component a source class and diagonal covariances in the whitened
    components that keep 80 % of the variance; it starts from the probe's own posteriors and takes five EM steps, so
    that nothing is drawn at random.
    """
    wide = logits.astype(np.float64)
    theta = softmax(wide.copy())
    wide -= wide.mean(axis=1, keepdims=True)
    points = _whitened(wide)
    squares = points**2
    for _ in range(STEPS):
        theta = _expectation_maximisation(theta, points, squares)
    return _expected_prediction(theta, starts)


def softmax(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Probabilities over axis 1, written over the logits."""
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


def _most_probable(logits: Features) -> Labels:
    """``argmax`` over axis 1 ``[k, n]``, which numpy is slow at where the axis is not the last."""
    best = logits[:, 0].copy()
    answers = np.zeros(best.shape, dtype=np.int64)
    for number in range(1, logits.shape[1]):
        np.copyto(answers, number, where=logits[:, number] > best)
        np.maximum(best, logits[:, number], out=best)
    return answers


def _expected_prediction(theta: NDArray[np.floating], starts: Labels) -> Scores:
    """LEEP of probabilities ``[k, z, n]``; a z without mass counts for nothing."""
    spans = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
    joint = np.stack([theta[:, :, span].sum(axis=2) for span in spans], axis=2)
    marginal = joint.sum(axis=2, keepdims=True)
    given = joint / np.where(marginal > 0, marginal, 1)
    total = np.zeros(len(theta))
    for number, span in enumerate(spans):
        expected = np.einsum("kzn,kz->kn", theta[:, :, span], given[:, :, number])
        total += np.log(expected).sum(axis=1, dtype=np.float64)
    return np.asarray(total / theta.shape[2])


def _whitened(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Principal components ``[k, c, n]`` with unit variance; those behind ``ENERGY`` of the variance are 0."""
    points = points - points.mean(axis=2, keepdims=True)
    values, vectors = np.linalg.eigh(points @ points.transpose(0, 2, 1) / points.shape[2])
    values, vectors = np.maximum(values[:, ::-1], 0), vectors[:, :, ::-1]
    before = np.cumsum(values, axis=1) - values
    kept = (before < ENERGY * values.sum(axis=1, keepdims=True)) & (values > 1e-10 * values[:, :1])
    scale = np.where(kept, 1 / np.sqrt(np.where(kept, values, 1)), 0)
    return np.asarray((vectors * scale[:, None]).transpose(0, 2, 1) @ points)


def _expectation_maximisation(
    theta: NDArray[np.floating], points: NDArray[np.float64], squares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The next posteriors ``[k, v, n]`` of mixtures of Gaussians over ``points [k, c, n]``."""
    mass = theta.sum(axis=2)[:, :, None]
    some = np.where(mass > 0, mass, 1)
    means = theta @ points.transpose(0, 2, 1) / some
    spreads = theta @ squares.transpose(0, 2, 1) / some - means**2
    inverse = 1 / (np.maximum(spreads, 0) + LEAST_VARIANCE)
    fixed = ((means**2 * inverse) - np.log(inverse)).sum(axis=2, keepdims=True)
    distances = inverse @ squares - 2 * (means * inverse) @ points + fixed
    weight = np.log(np.maximum(mass / theta.shape[2], 1e-300))
    return np.asarray(softmax(weight - distances / 2))
