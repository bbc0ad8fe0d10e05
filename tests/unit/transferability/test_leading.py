"""The nearest of source tasks that come some at a time: whatever their order, and no more is kept than leads."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from kinprune.transferability import MEASURES, Leaders, Sources, Target, TransferabilityError, leading, transferability

Pair = Callable[..., tuple[Target, Sources]]


def names(sources: Sources) -> NDArray[np.str_]:
    """Keys in another order than the places."""
    return np.array([f"{place * 7919 % 10007:05d}" for place in range(len(sources))])


def lots(order: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def led(leaders: Leaders, sources: Sources, keys: NDArray[np.str_], order: NDArray[np.int64], size: int) -> Leaders:
    for places in lots(order, size):
        leaders.add(sources.take(places), keys[places])
    return leaders


@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_best_have_their_exact_scores(measure: str, farthest: bool, make_pair: Pair) -> None:
    target, sources = make_pair(counts=(3, 2, 4, 3, 5, 2) * 5)
    keys, scores = names(sources), transferability(measure, target, sources)
    found, values = led(
        Leaders(measure, target, 4, farthest=farthest), sources, keys, np.arange(len(sources)), 7
    ).best()
    places = [keys.tolist().index(key) for key in found]
    np.testing.assert_allclose(values, scores[places], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(
        values, np.sort(scores if farthest else -scores)[:4] * (1 if farthest else -1), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("farthest", [False, True])
def test_order_and_size_of_the_lots_mean_nothing_to_the_last_bit(
    farthest: bool, make_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leading, "LEADERS", 40)
    monkeypatch.setattr(leading, "LEADERS_EACH", 1)
    target, sources = make_pair(shots=100, width=33, counts=(3, 5) * 150)
    keys = names(sources)
    random, known = np.random.default_rng(0), None
    for size in (300, 64, 1):
        leaders = Leaders("leep", target, 10, farthest=farthest)
        found = led(leaders, sources, keys, random.permutation(len(sources)), size).best()
        known = found if known is None else known
        assert found[0].tolist() == known[0].tolist() and found[1].tobytes() == known[1].tobytes()


def test_equal_ones_go_by_key(make_pair: Pair) -> None:
    target, sources = make_pair(counts=(3,) * 4)
    same = sources.take(np.zeros(6, dtype=np.int64))
    keys = np.array(["d", "b", "f", "a", "e", "c"])
    assert led(Leaders(ones, target, 3), same, keys, np.arange(6), 2).best()[0].tolist() == ["a", "b", "c"]


def ones(target: Target, sources: Sources) -> NDArray[np.float64]:
    return np.ones(len(sources))


def test_where_there_are_many_images_a_sample_finds_the_leaders(make_pair: Pair) -> None:
    target, sources = make_pair(shots=100, width=16, counts=(2, 3) * 1500)
    scores, keys = transferability("leep", target, sources), names(sources)
    leaders = led(Leaders("leep", target, 10), sources, keys, np.arange(3000), 500)
    assert len(leaders._rows) == leading.LEADERS  # the others were not scored on all images
    found, values = leaders.best()
    places = [keys.tolist().index(key) for key in found]
    np.testing.assert_allclose(values, scores[places], rtol=1e-6, atol=1e-6)
    assert len(np.intersect1d(places, np.argsort(-scores)[:10])) == 10


def test_memory_is_that_of_the_leaders(make_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "LEADERS", 50)
    monkeypatch.setattr(leading, "LEADERS_EACH", 1)
    target, sources = make_pair(width=200, counts=(3,) * 200)  # each 2.4 kB
    peaks = []
    for many in (4, 40):
        leaders = Leaders("leep", target, 5)
        tracemalloc.start()
        for lot in range(many):
            keys = np.array([f"{lot:03d} {place:03d}" for place in range(200)])
            leaders.add(sources.take(np.arange(200)), keys)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(leaders.best()[0]) == 5
    assert peaks[1] < 1.2 * peaks[0]


def test_none_at_all_and_a_count_of_none(make_pair: Pair) -> None:
    target, _ = make_pair()
    assert [len(part) for part in Leaders("leep", target, 3).best()] == [0, 0]
    with pytest.raises(TransferabilityError, match="0 nearest source tasks were asked for, expected at least 1"):
        Leaders("leep", target, 0)
