"""LogME and H-score: how well a linear model on a source's representation could tell the target's labels.

All sources share the backbone, so a source's representation is what its probe makes of the features: its c logits, less
their mean over classes, which says nothing about the classes. That matrix is n x c and of rank c - 1 at most.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from kinprune.transferability.inputs import Features, Labels, Scores

ITERATIONS = 11
TOLERANCE = 1e-3
"""When LogME's iteration stops: after so many rounds, or where alpha/beta moves by less than this share of itself."""

EPSILON = 1e-5
"""Added to the denominators of LogME's alpha and beta, as in the authors' code."""

LEAST_EIGENVALUE = 1e-10
"""Eigenvalues below this share of the greatest are taken for zero."""


def logme(logits: Features, starts: Labels) -> Scores:
    """LogME (You et al. 2021) of ``logits [k, c, n]``: mean log evidence an image, over classes one against the rest.

    The fixed-point iteration of the authors' code (``LogME._fit_fixed_point``); the determinant runs over all c
    dimensions, as in its first version, since centred logits never have full rank.
    """
    points = representation(logits)
    values, vectors = np.linalg.eigh(points @ points.transpose(0, 2, 1))
    values = np.where(values > LEAST_EIGENVALUE * values[:, -1:], values, 0)
    sigma = values[:, :, None]
    sums = vectors.transpose(0, 2, 1) @ _sums(points, starts)
    shares = np.where(sigma > 0, sums**2 / np.where(sigma > 0, sigma, 1), 0)
    rest = np.maximum(np.diff(starts) - shares.sum(axis=1), 0)
    return np.asarray(_evidence(sigma, shares, rest, logits.shape[2]).mean(axis=1))


def h_score(logits: Features, starts: Labels) -> Scores:
    """H-score (Bao et al. 2019) of ``logits [k, c, n]``: ``tr(pinv(cov f) cov(E[f|y]))``, 0 to the rank."""
    points = representation(logits)
    points -= points.mean(axis=2, keepdims=True)
    # Both covariances have the same divisor, which cancels.
    values, vectors = np.linalg.eigh(points @ points.transpose(0, 2, 1))
    kept = values > LEAST_EIGENVALUE * values[:, -1:]
    between = ((vectors.transpose(0, 2, 1) @ _sums(points, starts)) ** 2 / np.diff(starts)).sum(axis=2)
    return np.asarray(np.where(kept, between / np.where(kept, values, 1), 0).sum(axis=1))


def representation(logits: Features) -> NDArray[np.float64]:
    """Logits in double precision, less their mean over classes."""
    wide = logits.astype(np.float64)
    wide -= wide.mean(axis=1, keepdims=True)
    return wide


def _sums(points: NDArray[np.float64], starts: Labels) -> NDArray[np.float64]:
    """The sum over each class's images ``[k, c, classes]``."""
    return np.stack([points[:, :, start:stop].sum(axis=2) for start, stop in itertools.pairwise(starts)], axis=2)


def _evidence(
    sigma: NDArray[np.float64], shares: NDArray[np.float64], rest: NDArray[np.float64], images: int
) -> NDArray[np.float64]:
    """Log evidence an image ``[k, classes]`` at the fixed point of alpha and beta.

    ``sigma [k, c, 1]`` are the squared singular values, ``shares [k, c, classes]`` the squared projections of the
    labels on the left singular vectors, ``rest`` what of the labels lies outside of them.
    """
    alpha, beta = np.ones_like(rest), np.ones_like(rest)
    residual, norm = np.zeros_like(rest), np.zeros_like(rest)
    running = np.ones(rest.shape, dtype=bool)
    for _ in range(ITERATIONS):
        ratio = alpha / beta
        wide = ratio[:, None]
        shrunk = sigma + wide
        gamma = (sigma / shrunk).sum(axis=1)
        norm = np.where(running, (sigma * shares / shrunk**2).sum(axis=1), norm)
        residual = np.where(running, (shares * (wide / shrunk) ** 2).sum(axis=1) + rest, residual)
        # The floors hold where the representation says nothing at all, or everything: else a logarithm of zero.
        alpha = np.where(running, np.maximum(gamma / (norm + EPSILON), 1e-100), alpha)
        beta = np.where(running, np.maximum((images - gamma) / (residual + EPSILON), 1e-12), beta)
        running &= np.abs(alpha / beta - ratio) > TOLERANCE * ratio
        if not running.any():
            break
    determinant = np.log(alpha[:, None] + beta[:, None] * sigma).sum(axis=1)
    evidence = sigma.shape[1] * np.log(alpha) + images * np.log(beta) - determinant - beta * residual - alpha * norm
    return np.asarray((evidence - images * np.log(2 * np.pi)) / 2 / images)
