"""The measures against references that take one source task, class and image at a time, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kinprune.transferability import MEASURES, Sources, Target, transferability

Pair = Callable[..., tuple[Target, Sources]]
Floats = NDArray[np.float64]


def logits_of(target: Target, sources: Sources, place: int) -> Floats:
    count = sources.counts[place]
    weights = sources.weights[place, :count].astype(np.float64)
    return target.features.astype(np.float64) @ weights.T + sources.biases[place, :count].astype(np.float64)


def softmax(logits: Floats) -> Floats:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def expected_prediction(theta: Floats, labels: NDArray[np.int64]) -> float:
    n, sources = theta.shape
    joint = {
        (y, z): sum(theta[i, z] for i in range(n) if labels[i] == y) / n for y in set(labels) for z in range(sources)
    }
    marginal = [sum(joint[y, z] for y in set(labels)) for z in range(sources)]
    total = 0.0
    for i in range(n):
        total += math.log(
            sum(joint[labels[i], z] / marginal[z] * theta[i, z] for z in range(sources) if marginal[z] > 0)
        )
    return total / n


def leep(target: Target, sources: Sources, place: int) -> float:
    return expected_prediction(softmax(logits_of(target, sources, place)), target.labels)


def nce(target: Target, sources: Sources, place: int) -> float:
    answers = logits_of(target, sources, place).argmax(axis=1)
    n = len(answers)
    entropy = 0.0
    for z in set(answers):
        for y in set(target.labels):
            both = sum(answers[i] == z and target.labels[i] == y for i in range(n)) / n
            if both:
                entropy -= both * math.log(both / (sum(answers == z) / n))
    return -entropy


def n_leep(target: Target, sources: Sources, place: int) -> float:
    logits = logits_of(target, sources, place)
    centred = logits - logits.mean(axis=1, keepdims=True)
    centred = centred - centred.mean(axis=0)
    n = len(centred)
    values, vectors = np.linalg.eigh(centred.T @ centred / n)
    kept: list[int] = []
    for j in range(len(values) - 1, -1, -1):
        if sum(values[i] for i in kept) < 0.8 * values.sum() and values[j] > 1e-10 * values[-1]:
            kept.append(j)
    points = centred @ vectors[:, kept] / np.sqrt(values[kept])
    theta = softmax(logits)
    for _ in range(5):
        log_posterior = np.empty_like(theta)
        for v in range(theta.shape[1]):
            mass = theta[:, v].sum()
            mean = (theta[:, v, None] * points).sum(axis=0) / mass
            variance = (theta[:, v, None] * (points - mean) ** 2).sum(axis=0) / mass + 1e-2
            density = -0.5 * ((points - mean) ** 2 / variance + np.log(variance)).sum(axis=1)
            log_posterior[:, v] = math.log(mass / n) + density
        theta = softmax(log_posterior)
    return expected_prediction(theta, target.labels)


def logme(target: Target, sources: Sources, place: int) -> float:
    """The evidence's formula, with the matrices written out and no decomposition."""
    logits = logits_of(target, sources, place)
    f = logits - logits.mean(axis=1, keepdims=True)
    n, d = f.shape
    evidences = []
    for label in sorted(set(target.labels)):
        y = (target.labels == label).astype(np.float64)
        alpha, beta = 1.0, 1.0
        for _ in range(11):
            ratio = alpha / beta
            a = alpha * np.eye(d) + beta * f.T @ f
            mean = beta * np.linalg.solve(a, f.T @ y)
            gamma = np.trace(beta * np.linalg.solve(a, f.T @ f))
            norm, residual = mean @ mean, ((y - f @ mean) ** 2).sum()
            alpha, beta = gamma / (norm + 1e-5), (n - gamma) / (residual + 1e-5)
            if abs(alpha / beta - ratio) / ratio <= 1e-3:
                break
        determinant = np.linalg.slogdet(alpha * np.eye(d) + beta * f.T @ f)[1]
        evidence = d / 2 * math.log(alpha) + n / 2 * math.log(beta) - determinant / 2
        evidence += -beta / 2 * residual - alpha / 2 * norm - n / 2 * math.log(2 * math.pi)
        evidences.append(evidence / n)
    return float(np.mean(evidences))


def h_score(target: Target, sources: Sources, place: int) -> float:
    logits = logits_of(target, sources, place)
    f = logits - logits.mean(axis=1, keepdims=True)
    g = np.zeros_like(f)
    for label in set(target.labels):
        g[target.labels == label] = f[target.labels == label].mean(axis=0)
    return float(np.trace(np.linalg.pinv(np.cov(f, rowvar=False), rcond=1e-9) @ np.cov(g, rowvar=False)))


def class_mean(target: Target, sources: Sources, place: int) -> float:
    features = target.features.astype(np.float64)
    own = [features[target.labels == label].mean(axis=0) for label in sorted(set(target.labels))]
    centre = np.mean(own, axis=0)
    theirs = [sources.means[place, z].astype(np.float64) - centre for z in range(sources.counts[place])]
    best = []
    for mean in own:
        side = mean - centre
        best.append(max(side @ other / np.linalg.norm(side) / np.linalg.norm(other) for other in theirs))
    return float(np.mean(best))


REFERENCES: dict[str, Callable[[Target, Sources, int], float]] = {
    "leep": leep,
    "nce": nce,
    "n-leep": n_leep,
    "logme": logme,
    "h-score": h_score,
    "class-mean": class_mean,
}


# --- against the above


def pair(*rows: list[float], labels: list[int], probes: list[list[list[float]]]) -> tuple[Target, Sources]:
    """A target with these features, and sources without bias whose means are their weights."""
    weights = np.array(probes, dtype=np.float32)
    target = Target(np.array(rows, dtype=np.float32), np.array(labels, dtype=np.int64), max(labels) + 1)
    counts = np.full(len(weights), weights.shape[1], dtype=np.int64)
    return target, Sources(weights, np.zeros(weights.shape[:2], dtype=np.float32), weights, counts)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("counts", [(3,) * 6, (2, 5, 3, 2, 4, 5, 2), (2,)], ids=["even", "ragged", "one"])
@pytest.mark.parametrize("seed", range(3))
def test_a_measure_is_its_formula(measure: str, counts: tuple[int, ...], seed: int, make_pair: Pair) -> None:
    target, sources = make_pair(seed, counts=counts)
    expected = [REFERENCES[measure](target, sources, place) for place in range(len(counts))]
    found = transferability(measure, target, sources)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_classes_without_images_change_nothing(measure: str, make_pair: Pair) -> None:
    target, sources = make_pair(counts=(2, 3, 4))
    spread = Target(target.features, np.array([1, 4, 6])[target.labels], 9)
    np.testing.assert_array_equal(transferability(measure, spread, sources), transferability(measure, target, sources))


@pytest.mark.parametrize("measure", MEASURES)
def test_kin_come_before_strangers(measure: str, make_pair: Pair) -> None:
    won = 0
    for seed in range(10):
        target, sources = make_pair(seed, shots=40, width=32, counts=(3,) * 8)
        scores = transferability(measure, target, sources)
        won += scores[0] > scores[-1]
    assert won >= 9


# --- by hand


def test_leep_by_hand() -> None:
    # Probabilities of the first class: 3/4, 3/4 for label 0 and 1/4 for label 1.
    high = math.log(3)
    target, sources = pair([1, 0], [1, 0], [0, 1], labels=[0, 0, 1], probes=[[[high, 0], [0, high]]])
    # P(0, z) = (6/4, 2/4) / 3, P(1, z) = (1/4, 3/4) / 3: P(0|z) = (6/7, 2/5), P(1|z) = (1/7, 3/5).
    first = 6 / 7 * 3 / 4 + 2 / 5 * 1 / 4
    second = 1 / 7 * 1 / 4 + 3 / 5 * 3 / 4
    expected = (2 * math.log(first) + math.log(second)) / 3
    assert transferability("leep", target, sources)[0] == pytest.approx(expected, rel=1e-6)


def test_nce_by_hand() -> None:
    target, sources = pair([1, 0], [1, 0], [1, 0], [0, 1], labels=[0, 0, 1, 1], probes=[[[1, 0], [0, 1]]])
    # Three images are answered 0, two of them of label 0; one is answered 1.
    expected = 3 / 4 * (2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert transferability("nce", target, sources)[0] == pytest.approx(expected, rel=1e-6)


def test_nce_takes_the_first_of_equals() -> None:
    target, sources = pair([1, 1], [0, 1], labels=[0, 1], probes=[[[1, 0], [0, 1]], [[0, 1], [1, 0]]])
    np.testing.assert_allclose(transferability("nce", target, sources), [0, -math.log(2)], atol=1e-12)


def test_n_leep_finds_two_heaps_whatever_the_probe_is_sure_of() -> None:
    # Both heaps lie on one side of the probe's boundary: LEEP sees little, the mixture finds them.
    rows = [[4.0], [4.1], [4.05], [8.0], [8.1], [8.05]]
    target, sources = pair(*rows, labels=[0, 0, 0, 1, 1, 1], probes=[[[0.5], [-0.5]]])
    assert transferability("n-leep", target, sources)[0] == pytest.approx(0, abs=1e-3)
    assert transferability("leep", target, sources)[0] < -0.5


def test_logme_by_hand() -> None:
    # F is (1, -1) for label 0 and (-1, 1) for label 1: one squared singular value of 4 * 2 = 8 and one of 0. Each
    # class's labels have the projection sum(f y)^2 / 8 = (2 * sqrt 2)^2 / 8 = 1 of a squared length of 2.
    target, sources = pair([1, 0], [1, 0], [0, 1], [0, 1], labels=[0, 0, 1, 1], probes=[[[2, 0], [0, 2]]])
    alpha = beta = 1.0
    for _ in range(11):
        t = alpha / beta
        gamma, norm, residual = 8 / (8 + t), 8 / (8 + t) ** 2, (t / (8 + t)) ** 2 + 1
        alpha, beta = gamma / (norm + 1e-5), (4 - gamma) / (residual + 1e-5)
        if abs(alpha / beta - t) <= 1e-3 * t:
            break
    evidence = math.log(alpha) / 2 + 2 * math.log(beta) - math.log(alpha + 8 * beta) / 2
    evidence += -beta / 2 * residual - alpha / 2 * norm - 2 * math.log(2 * math.pi)
    assert transferability("logme", target, sources)[0] == pytest.approx(evidence / 4, rel=1e-6)


def test_h_score_by_hand() -> None:
    # One dimension: variance between classes over variance in all. Values 3, 1 | -1, -3: 4 * 2^2 over 20.
    target, sources = pair([3], [1], [-1], [-3], labels=[0, 0, 1, 1], probes=[[[1], [-1]]])
    assert transferability("h-score", target, sources)[0] == pytest.approx(16 / 20, rel=1e-6)


def test_class_mean_by_hand() -> None:
    # Class means (6, 5) and (4, 5), so the centre is (5, 5); the sides are (1, 0) and (-1, 0).
    target, sources = pair([7, 5], [5, 5], [4, 5], labels=[0, 0, 1], probes=[[[8, 9], [5, 6]]])
    # From the centre: (3, 4), with cosines 3/5 and -3/5, and (0, 1), with 0 and 0.
    assert transferability("class-mean", target, sources)[0] == pytest.approx((3 / 5 + 0) / 2, rel=1e-6)


# --- at the edges


@pytest.mark.parametrize("measure", MEASURES)
def test_one_image_a_class_is_enough(measure: str, make_pair: Pair) -> None:
    target, sources = make_pair(shots=1, counts=(2, 3, 4, 7))
    expected = [REFERENCES[measure](target, sources, place) for place in range(4)]
    np.testing.assert_allclose(transferability(measure, target, sources), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [("leep", -math.log(2)), ("nce", -math.log(2)), ("n-leep", -math.log(2)), ("h-score", 0), ("class-mean", 0)],
)
def test_a_probe_that_says_nothing_scores_as_chance(measure: str, expected: float) -> None:
    target, sources = pair([1, 0], [-1, 0], labels=[0, 1], probes=[[[0, 0], [0, 0]]])
    assert transferability(measure, target, sources)[0] == pytest.approx(expected, abs=1e-6)


def test_logme_of_a_probe_that_says_nothing_is_finite_and_least() -> None:
    rows = [[1.0, 0.1 * number] for number in range(10)] + [[-1.0, 0.1 * number] for number in range(10)]
    target, sources = pair(*rows, labels=[0] * 10 + [1] * 10, probes=[[[0, 0], [0, 0]], [[1, 0], [0, 0]]])
    nothing, told = transferability("logme", target, sources)
    assert nothing < told


@pytest.mark.parametrize("measure", MEASURES)
def test_a_probe_that_is_sure_of_everything_is_scored(measure: str) -> None:
    target, sources = pair([1, 0], [1, 0], [0, 1], labels=[0, 0, 1], probes=[[[9e4, 0], [0, 9e4]]])
    expected = {"leep": 0.0, "nce": 0.0, "n-leep": 0.0, "h-score": 1.0}
    found = transferability(measure, target, sources)[0]
    assert found == pytest.approx(expected.get(measure, found), abs=1e-6)
