from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kinprune.transferability import (
    MEASURES,
    Sources,
    Target,
    TransferabilityError,
    chunks,
    measures,
    nearest,
    register,
    sample,
    transferability,
)

Pair = Callable[..., tuple[Target, Sources]]
RAGGED = (2, 4, 3, 3, 2, 4, 4, 3, 2, 3, 4, 2)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names that a test registers are forgotten."""
    monkeypatch.setattr(measures, "_registered", dict(measures._registered))
    yield


def first_bias(target: Target, sources: Sources) -> np.ndarray:
    return sources.biases[:, 0].astype(np.float64)


# --- what scores do not depend on


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("chunk", [1, 100, 400])
@pytest.mark.parametrize("block", [1, 200])
def test_chunks_change_nothing(
    measure: str, chunk: int, block: int, make_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, sources = make_pair(counts=RAGGED)
    whole = transferability(measure, target, sources)
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    monkeypatch.setattr(chunks, "BLOCK", block)
    np.testing.assert_allclose(transferability(measure, target, sources), whole, rtol=1e-6, atol=1e-6)


def test_no_chunk_is_larger_than_said(make_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, sources = make_pair(counts=RAGGED, width=6)
    monkeypatch.setattr(chunks, "CHUNK", 100)
    seen = []
    for places, chunk in chunks.converted(sources.weights, sources.counts, images=10):
        assert chunk.dtype == np.float32 and len(chunk) == len(places)
        assert chunk.shape[0] * chunk.shape[1] * 10 <= 100
        assert set(sources.counts[places]) == {chunk.shape[1]}
        np.testing.assert_array_equal(chunk, sources.weights[places, : chunk.shape[1]].astype(np.float32))
        seen.extend(places)
    assert sorted(seen) == list(range(len(RAGGED)))
    # One task is the least there can be.
    monkeypatch.setattr(chunks, "CHUNK", 1)
    assert all(len(chunk) == 1 for _, chunk in chunks.converted(sources.weights, sources.counts))


@pytest.mark.parametrize("measure", MEASURES)
def test_sources_may_be_read_only_reversed_or_on_disk(measure: str, make_pair: Pair, tmp_path: Path) -> None:
    target, sources = make_pair(counts=(4,) * 6)
    expected = transferability(measure, target, sources)
    np.save(tmp_path / "weights.npy", sources.weights)
    np.save(tmp_path / "means.npy", sources.means)
    weights, means = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("weights", "means"))
    mapped = Sources(weights, sources.biases, means, sources.counts)
    np.testing.assert_array_equal(transferability(measure, target, mapped), expected)
    turned = Sources(sources.weights[::-1], sources.biases[::-1], sources.means[::-1], sources.counts[::-1])
    np.testing.assert_allclose(transferability(measure, target, turned)[::-1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_inputs_are_left_alone(measure: str, make_pair: Pair) -> None:
    target, sources = make_pair(counts=RAGGED)
    before = [target.features.copy(), *(array.copy() for array in (sources.weights, sources.biases, sources.means))]
    wide = Sources(*(array.astype(np.float32) for array in before[1:]), sources.counts)
    np.testing.assert_allclose(
        transferability(measure, target, wide), transferability(measure, target, sources), rtol=1e-6, atol=1e-6
    )
    after = (target.features, wide.weights, wide.biases, wide.means)
    for array, copy in zip(after, before, strict=True):
        np.testing.assert_array_equal(array, copy.astype(np.float32))


# --- measures of one's own


def test_a_function_is_a_measure(make_pair: Pair) -> None:
    target, sources = make_pair(counts=(3,) * 4)
    np.testing.assert_array_equal(transferability(first_bias, target, sources), sources.biases[:, 0])


@pytest.mark.usefixtures("registry")
def test_a_registered_measure_is_known_by_its_name(make_pair: Pair) -> None:
    target, sources = make_pair(counts=(3,) * 4)
    register("first-bias", first_bias)
    np.testing.assert_array_equal(transferability("first-bias", target, sources), sources.biases[:, 0])
    for name in ("first-bias", "leep"):
        with pytest.raises(TransferabilityError, match=f"already a measure '{name}'"):
            register(name, first_bias)


def test_an_unknown_measure_is_refused(make_pair: Pair) -> None:
    with pytest.raises(TransferabilityError, match=r"no measure 'lep', expected one of: leep, nce, .*class-mean"):
        transferability("lep", *make_pair())


def test_what_a_function_gives_is_checked(make_pair: Pair) -> None:
    pair = make_pair(counts=(3,) * 4)
    with pytest.raises(TransferabilityError, match=r"scores of shape \(3,\), expected \(4,\)"):
        transferability(lambda target, sources: np.zeros(3), *pair)
    with pytest.raises(TransferabilityError, match="gave 2 of 4 source tasks no finite score, task 1 the first"):
        transferability(lambda target, sources: np.array([0, np.nan, 0, np.inf]), *pair)


@pytest.mark.parametrize("measure", MEASURES)
def test_scores_on_a_sample_are_those_of_the_sample(measure: str, make_pair: Pair) -> None:
    target, sources = make_pair(counts=RAGGED)
    np.testing.assert_array_equal(
        transferability(measure, target, sources, images=9, seed=4),
        transferability(measure, sample(target, 9, 4), sources),
    )


# --- the nearest


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("count", [1, 5, 12])
def test_the_nearest_of_few_are_the_best_scores(measure: str, count: int, make_pair: Pair) -> None:
    target, sources = make_pair(counts=RAGGED)
    scores = transferability(measure, target, sources)
    places, found = nearest(measure, target, sources, count)
    assert places.dtype == np.int64 and found.dtype == np.float64
    np.testing.assert_array_equal(places, np.argsort(-scores, kind="stable")[:count])
    np.testing.assert_array_equal(found, scores[places])


@pytest.mark.parametrize("count", [0, -1, 13])
def test_counts_out_of_range_are_refused(count: int, make_pair: Pair) -> None:
    with pytest.raises(TransferabilityError, match=f"{count} nearest of 12 source tasks .* expected 1 to all"):
        nearest("leep", *make_pair(counts=RAGGED), count)


def many(make_pair: Pair, seed: int = 0) -> tuple[Target, Sources]:
    """A bank so large that a sample is looked at first."""
    target, sources = make_pair(seed, shots=100, width=16, counts=(2, 3) * 700)
    assert measures._few("leep", target, sources, 10) is not None
    return target, sources


@pytest.mark.parametrize("measure", ["leep", "nce", "logme", "h-score"])
def test_the_nearest_of_many_have_their_exact_scores(measure: str, make_pair: Pair) -> None:
    target, sources = many(make_pair)
    places, found = nearest(measure, target, sources, 10)
    scores = transferability(measure, target, sources)
    np.testing.assert_allclose(found, scores[places], rtol=1e-6, atol=1e-6)
    assert len(set(places)) == 10 and all(one >= other for one, other in itertools.pairwise(found))
    assert len(np.intersect1d(places, np.argsort(-scores, kind="stable")[:10])) >= 9
    again = nearest(measure, target, sources, 10)
    np.testing.assert_array_equal(again[0], places)
    np.testing.assert_array_equal(again[1], found)


def test_only_the_leading_are_scored_on_all_images(make_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    target, sources = many(make_pair)
    seen = []
    real = measures.score_logits

    def watched(kernel: object, target: Target, sources: Sources) -> np.ndarray:
        seen.append((len(target.labels), len(sources)))
        return real(measures._KERNELS["leep"], target, sources)

    monkeypatch.setitem(measures._registered, "leep", lambda target, sources: watched(None, target, sources))
    nearest("leep", target, sources, 10)
    assert seen == [(96, 1400), (300, 500)]


def test_measures_of_ones_own_are_scored_in_full(make_pair: Pair) -> None:
    target, sources = many(make_pair)
    places, found = nearest(first_bias, target, sources, 3)
    np.testing.assert_array_equal(found, np.sort(sources.biases[:, 0].astype(np.float64))[::-1][:3])
    np.testing.assert_array_equal(sources.biases[places, 0], found)


def test_equal_scores_go_by_place(make_pair: Pair) -> None:
    target, sources = make_pair(counts=RAGGED)
    places, _ = nearest(lambda target, sources: np.tile([1.0, 2.0], 6), target, sources, 8)
    assert places.tolist() == [1, 3, 5, 7, 9, 11, 0, 2]
