"""What a bank's rows hold comes back, whatever the numbers; no two contents have one seal; a claim has one holder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kinprune.bank import Accuracy, Bank, Record, record_key, schema
from kinprune.bank.claims import claim, claims, drop_expired, release, renew
from kinprune.bank.coding import WIDEST, decode_probe, decode_units, encode_probe, encode_units, seal
from kinprune.bank.migrating import upgrade
from kinprune.bank.weights import pack, unpack
from kinprune.calibration import Probe
from kinprune.errors import BankError
from kinprune.units import Mask

HALVES = st.floats(-65_504, 65_504, width=16)
SINGLES = st.floats(-65_504, 65_504, width=32)


def record_of(sizes: list[int], scores: np.ndarray, kept: np.ndarray, seed: int) -> Record:
    generator = np.random.default_rng(seed)
    ranking = np.concatenate([generator.permutation(size) for size in sizes]).astype(np.int64)
    nothing = np.zeros(0, dtype=np.float32)
    probe = Probe(nothing, nothing, nothing, np.zeros(0, dtype=np.int64))
    return Record("k", "n", (), ranking, scores, Mask(kept, "f"), probe, Accuracy(0, 0, 0), {})


def groups_of(sizes: list[int]) -> tuple[tuple[str, int], ...]:
    return tuple((f"layer {number}", size) for number, size in enumerate(sizes))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 2**31), st.data())
def test_units_come_back(sizes: list[int], seed: int, data: st.DataObject) -> None:
    units = sum(sizes)
    scores = data.draw(arrays.arrays(np.float16, units, elements=HALVES))
    kept = data.draw(arrays.arrays(np.bool_, units))
    record = record_of(sizes, scores, kept, seed)
    blob = encode_units(record, groups_of(sizes))
    assert len(blob) == 4 * units + (units + 7) // 8
    ranking, found, mask = decode_units(blob, groups_of(sizes))
    assert np.array_equal(ranking, record.ranking) and ranking.dtype == np.int64
    assert found.tobytes() == scores.tobytes() and np.array_equal(mask, kept)
    for wrong in (blob[:-1], blob + b"\0"):
        with pytest.raises(BankError, match="not as long"):
            decode_units(wrong, groups_of(sizes))


@settings(max_examples=4, deadline=None)
@given(st.sampled_from([WIDEST - 1, WIDEST, WIDEST + 1, WIDEST + 2]), st.integers(0, 2**31))
def test_places_in_large_groups_come_back(largest: int, seed: int) -> None:
    sizes = [3, largest]
    units = sum(sizes)
    record = record_of(sizes, np.zeros(units, np.float16), np.ones(units, np.bool_), seed)
    blob = encode_units(record, groups_of(sizes))
    assert len(blob) == (4 if largest <= 65_535 else 6) * units + (units + 7) // 8
    ranking = decode_units(blob, groups_of(sizes))[0]
    assert np.array_equal(ranking, record.ranking) and ranking.max() == largest - 1


def probes(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Probe]:
    def of(shape: tuple[int, int]) -> st.SearchStrategy[Probe]:
        return st.builds(
            Probe,
            arrays.arrays(np.float32, shape, elements=elements),
            arrays.arrays(np.float32, shape[0], elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
            arrays.arrays(np.float32, shape, elements=elements),
            arrays.arrays(np.int64, shape[0], elements=st.integers(0, 2**31 - 1)),
        )

    return st.tuples(st.integers(2, 5), st.integers(1, 7)).flatmap(of)


@given(probes(SINGLES))
def test_probes_come_back_in_half_precision(probe: Probe) -> None:
    """Biases and counts exactly; weights and means to 11 binary digits, or to 2^-25 below the smallest normal half."""
    classes, features = probe.weights.shape
    blob = encode_probe(probe)
    found = decode_probe(blob, classes, features)
    assert np.array_equal(found.biases, probe.biases) and np.array_equal(found.counts, probe.counts)
    for name in ("weights", "means"):
        put, got = getattr(probe, name).astype(np.float64), getattr(found, name).astype(np.float64)
        assert (np.abs(got - put) <= np.maximum(np.abs(put) * 2.0**-11, 2.0**-25)).all()
    for wrong in ((classes + 1, features), (classes, features + 1), (classes - 1, features)):
        with pytest.raises(BankError, match="not as long"):
            decode_probe(blob, *wrong)


@given(probes(HALVES))
def test_probes_of_halves_come_back_exactly(probe: Probe) -> None:
    found = decode_probe(encode_probe(probe), *probe.weights.shape)
    assert np.array_equal(found.weights, probe.weights) and np.array_equal(found.means, probe.means)


@given(probes(HALVES), st.sampled_from([65_520.0, 1e30, -7e4]))
def test_probes_too_large_for_half_precision_are_refused(probe: Probe, large: float) -> None:
    means = probe.means.copy()
    means[-1, -1] = large
    with pytest.raises(BankError, match="over 65,504"):
        encode_probe(replace(probe, means=means))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
CONTENT = st.one_of(st.binary(max_size=6), TEXT)
SEALED = st.tuples(TEXT, st.sampled_from(["record", "probe"]), st.lists(CONTENT, max_size=3))


@given(SEALED, SEALED)
def test_different_rows_have_different_seals(
    one: tuple[str, str, list[bytes | str]], two: tuple[str, str, list[bytes | str]]
) -> None:
    """Moving a byte from one column to the next, too, changes the seal."""

    def plain(row: tuple[str, str, list[bytes | str]]) -> object:
        return *row[:2], [part.encode() if isinstance(part, str) else part for part in row[2]]

    same = seal(one[0], one[1], *one[2]) == seal(two[0], two[1], *two[2])
    assert same == (plain(one) == plain(two))


@given(arrays.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=False)), st.booleans())
def test_weights_come_back(values: np.ndarray, lossless: bool) -> None:
    """In half precision where that holds them, else as they are; exactly where nothing may be lost."""
    found = unpack(pack({"a": torch.from_numpy(values)}, lossless=lossless))["a"]
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    exact = np.array_equal(halves.astype(np.float32), values)
    if exact if lossless else np.isfinite(halves).all():
        assert found.dtype == torch.float16 and np.array_equal(found.numpy(), halves)
    else:
        assert found.dtype == torch.float32 and np.array_equal(found.numpy(), values)
    assert not lossless or np.array_equal(found.float().numpy(), values)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(TEXT, JSON, max_size=4), TEXT)
def test_keys_do_not_depend_on_the_order_of_what_was_asked(asked: dict[str, object], digest: str) -> None:
    key = record_key(digest, asked)
    assert key == record_key(digest, dict(reversed(asked.items()))) and len(key) == 64
    assert key != record_key(digest + "x", asked) and key != record_key(digest, {**asked, "one more": 1})


@pytest.fixture(scope="module")
def empty() -> Iterator[Bank]:
    """A bank's tables in a file, with nothing in them: claims need no more."""
    with (
        tempfile.TemporaryDirectory() as folder,
        schema.connected(schema.parse_address(Path(folder) / "bank.db")) as engine,
    ):
        with schema.writing(engine) as connection:
            upgrade(connection)
        yield Bank(folder, cast(Any, None), cast(Any, None), engine)


KEYS, OWNERS = ("a", "b", "c"), ("ann", "bob", "cid")
STEP = st.one_of(
    st.tuples(st.just("claim"), st.sampled_from(KEYS), st.sampled_from(OWNERS), st.integers(1, 9)),
    st.tuples(st.just("renew"), st.sets(st.sampled_from(KEYS)), st.sampled_from(OWNERS), st.integers(1, 9)),
    st.tuples(st.just("release"), st.sets(st.sampled_from(KEYS)), st.sampled_from(OWNERS), st.just(0)),
    st.tuples(st.just("wait"), st.just(""), st.just(""), st.integers(1, 9)),
    st.tuples(st.just("drop"), st.just(""), st.just(""), st.just(0)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEP, max_size=25))
def test_a_claim_has_one_holder_until_it_runs_out(empty: Bank, steps: list[tuple[str, Any, str, int]]) -> None:
    """Whatever is claimed, renewed, released and waited for, the table says what a dictionary of holders says."""
    clock = 1000.0
    known: dict[str, tuple[str, float]] = {}
    with schema.writing(empty.engine) as connection:
        connection.execute(schema.claim.delete())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kinprune.bank.claims.time.time", lambda: clock)
        for what, keys, owner, seconds in steps:
            if what == "wait":
                clock += seconds
            elif what == "claim":
                free = keys not in known or known[keys][0] == owner or known[keys][1] <= clock
                assert claim(empty, keys, owner, seconds) == ("yes" if free else "taken")
                known.update({keys: (owner, clock + seconds)} if free else {})
            elif what == "drop":
                gone = [key for key, (_, until) in known.items() if until <= clock]
                assert drop_expired(empty) == len(gone)
                known = {key: held for key, held in known.items() if key not in gone}
            else:
                own = {key for key in keys if key in known and known[key][0] == owner}
                if what == "renew":
                    assert renew(empty, keys, owner, seconds) == own
                    known.update({key: (owner, clock + seconds) for key in own})
                else:
                    release(empty, keys, owner)
                    known = {key: held for key, held in known.items() if key not in own}
            live = {key: (owner, until - clock) for key, (owner, until) in known.items() if until > clock}
            assert {entry.key: (entry.owner, entry.seconds) for entry in claims(empty)} == live
