"""Records in files of their own: whatever they hold comes back in half precision, and no damage goes unseen."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kinprune.backbones import BackboneSpec
from kinprune.bank import Accuracy, Header, Record, read_record, write_record
from kinprune.calibration import Probe
from kinprune.errors import BankError
from kinprune.preprocessing import Preprocessing
from kinprune.units import Mask

HALVES = st.floats(-65_504, 65_504, width=32)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
SHARE = st.floats(0, 1)
TENSOR = arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), elements=HALVES)


@st.composite
def records(draw: st.DrawFn) -> tuple[Record, Header]:
    """A record of any size, and the header of a bank that takes it."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    classes = tuple(draw(st.lists(TEXT, min_size=2, max_size=4, unique=True)))
    features, units = draw(st.integers(1, 5)), sum(sizes)
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    ranking = np.concatenate([generator.permutation(size) for size in sizes]).astype(np.int64)
    kept = draw(arrays.arrays(np.bool_, units))
    kept[np.cumsum([0, *sizes[:-1]])] = True  # every group keeps a unit

    def matrix(*shape: int) -> Any:
        return draw(arrays.arrays(np.float32, shape, elements=HALVES))

    header = Header(
        spec=BackboneSpec("some:model", {}, len(classes), "head"),
        preprocessing=Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0),
        backbone="b" * 64,
        space="s" * 64,
        stream=draw(st.booleans()),
        groups=tuple((f"layer {number}", size) for number, size in enumerate(sizes)),
        features=features,
        backbone_weights="w" * 64,
    )
    record = Record(
        key=draw(st.text("0123456789abcdef", min_size=1, max_size=64)),
        name=draw(TEXT),
        classes=classes,
        ranking=ranking,
        scores=draw(arrays.arrays(np.float16, units, elements=st.floats(-65_504, 65_504, width=16))),
        mask=Mask(kept, header.space),
        probe=Probe(
            matrix(len(classes), features),
            matrix(len(classes)),
            matrix(len(classes), features),
            draw(arrays.arrays(np.int64, len(classes), elements=st.integers(0, 2**31 - 1))),
        ),
        accuracy=Accuracy(draw(SHARE), draw(SHARE), draw(SHARE)),
        tensors={
            name: torch.from_numpy(values.copy())
            for name, values in draw(st.dictionaries(st.text("abc./_", min_size=1), TENSOR, min_size=1)).items()
        },
        details=draw(st.dictionaries(TEXT, JSON, max_size=3)),
    )
    return record, header


def is_same(found: Record, put: Record) -> bool:
    """Whether a record came back, in half precision, bit for bit."""
    halves = {name: tensor.half() for name, tensor in put.tensors.items()}
    return (
        all(getattr(found, name) == getattr(put, name) for name in ("key", "name", "classes", "accuracy", "mask"))
        and found.details == put.details
        and np.array_equal(found.ranking, put.ranking)
        and found.scores.tobytes() == put.scores.tobytes()
        and all(
            getattr(found.probe, name).tobytes() == getattr(put.probe, name).astype("f2").astype("f4").tobytes()
            for name in ("weights", "means")
        )
        and found.probe.biases.tobytes() == put.probe.biases.tobytes()
        and np.array_equal(found.probe.counts, put.probe.counts)
        and found.tensors.keys() == halves.keys()
        and all(
            found.tensors[name].dtype == half.dtype
            and found.tensors[name].shape == half.shape
            and found.tensors[name].numpy().tobytes() == half.numpy().tobytes()
            for name, half in halves.items()
        )
    )


@settings(max_examples=60, deadline=None)
@given(records(), st.data())
def test_a_record_comes_back_and_no_damage_goes_unseen(given_: tuple[Record, Header], data: st.DataObject) -> None:
    record, header = given_
    with tempfile.TemporaryDirectory() as folder:
        path = write_record(record, header, Path(folder) / "record.safetensors")
        assert is_same(read_record(path, header), record)
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        place, change = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
        damaged = bytearray(content)
        damaged[place] ^= change
        for wrong in (bytes(damaged), content[:place], content + bytes([change])):
            path.write_bytes(wrong)
            try:
                found = read_record(path, header)
            except BankError:
                continue
            # White space and the case of an escape's digits mean the same, and only before the numbers.
            assert place < begin and len(wrong) == len(content) and is_same(found, record)
