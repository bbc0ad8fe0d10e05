"""Arrays to bytes and back: little-endian, without padding, with the hash that a row carries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kinprune.bank.record import Record
from kinprune.calibration import Probe
from kinprune.errors import BankError

WIDEST = 65_535
"""Units of the largest group whose places fit in 16 bits; larger ones take 32."""


def encode_units(record: Record, groups: tuple[tuple[str, int], ...]) -> bytes:
    """Ranking (uint16, or uint32 where a group is larger), scores (float16) and mask (a bit a unit), in this order."""
    place = _place_type(groups)
    ranking = record.ranking.astype(place).tobytes()
    scores = record.scores.astype("<f2").tobytes()
    return ranking + scores + np.packbits(record.mask.kept).tobytes()


def decode_units(
    blob: bytes, groups: tuple[tuple[str, int], ...]
) -> tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.bool_]]:
    """What ``encode_units`` wrote: ranking, scores and kept, each ``[u]``."""
    units, place = sum(size for _, size in groups), _place_type(groups)
    first = units * np.dtype(place).itemsize
    second = first + 2 * units
    if len(blob) != second + -(-units // 8):
        raise BankError("a record's ranking is not as long as the bank's unit space: it was damaged; remove it (rm)")
    ranking = np.frombuffer(blob[:first], dtype=place).astype(np.int64)
    scores = np.frombuffer(blob[first:second], dtype="<f2").astype(np.float16)
    kept = np.unpackbits(np.frombuffer(blob[second:], dtype=np.uint8), count=units).astype(bool)
    return ranking, scores, kept


def _place_type(groups: tuple[tuple[str, int], ...]) -> str:
    return "<u2" if max(size for _, size in groups) <= WIDEST else "<u4"


def encode_probe(probe: Probe) -> bytes:
    """Weights and means (float16), biases and counts (float32, int32)."""
    with np.errstate(over="ignore"):  # seen right below
        halves = [np.asarray(array, dtype=np.float32).astype("<f2") for array in (probe.weights, probe.means)]
    if not all(np.isfinite(half).all() for half in halves):
        raise BankError(
            "the record cannot be stored: its probe or class means are over 65,504, more than half precision holds: "
            "the backbone's features are too large"
        )
    parts = (*halves, probe.biases.astype("<f4"), probe.counts.astype("<i4"))
    return b"".join(part.tobytes() for part in parts)


def decode_probe(blob: bytes, classes: int, features: int) -> Probe:
    """What ``encode_probe`` wrote, in single precision."""
    weights, biases, means = (array[0].astype(np.float32) for array in decode_probes([blob], classes, features))
    counts = np.frombuffer(blob, dtype="<i4", count=classes, offset=len(blob) - 4 * classes)
    return Probe(weights, biases, means, counts.astype(np.int64))


def check_length(blob: bytes, classes: int, features: int) -> None:
    """BankError where a blob is no probe of so many classes and features."""
    if len(blob) != 4 * classes * features + 8 * classes:
        raise BankError("a record's probe is not as long as its classes and features: it was damaged; remove it (rm)")


def decode_probes(
    blobs: Sequence[bytes], classes: int, features: int
) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.float16]]:
    """The weights ``[n, c, d]``, biases ``[n, c]`` and means ``[n, c, d]`` of probes of as many classes, as stored."""
    for blob in blobs:
        check_length(blob, classes, features)
    size = 2 * classes * features
    rows = np.frombuffer(bytearray().join(blobs), dtype=np.uint8).reshape(len(blobs), -1)
    weights, means = (
        rows[:, start : start + size].view("<f2").reshape(len(blobs), classes, features) for start in (0, size)
    )
    return weights, rows[:, 2 * size : 2 * size + 4 * classes].view("<f4"), means


def seal(key: str, kind: str, *contents: bytes | str) -> str:
    """The hash of a row: of its record's key and its contents, so that rows cannot be exchanged unseen."""
    digest = hashlib.sha256(f"{kind}\n{key}\n".encode())
    for content in contents:
        data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
