"""Sketches: probes in a fifteenth of their bytes, which rule out most of a large bank without reading it.

Logits ``W f + b`` are told, but for a constant and a small error, from 64 numbers a class: ``(W - mean W) B`` times
``A' (f - m)``, where ``m`` is the mean of class means, and A and B keep the directions in which probes and features
both vary most. A sketch is of some thousand records with following numbers, is told by them alone, and never changes;
what is newer than the last sketch is read as it is. Sketches lie beside a bank's file, or else in the user's cache, can
be deleted at any time, and are made while a bank is read.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as read_arrays
from safetensors.numpy import save as write_arrays
from sqlalchemy import func, select

from kinprune.bank import schema
from kinprune.bank.probes import ProbeChunk
from kinprune.bank.retrying import retried
from kinprune.bank.storage import Bank
from kinprune.transferability import Sources, Target, transferability

RECORDS = 16_384
"""Records of a sketch: fewer are read as they are, in less than a second."""

RANK = 64
"""Numbers a class."""

LIKELY = 0.02
"""The share of a sketch's records that may be near: of 20,000 real tasks the nearest ten were in the first 1.1 %."""

MEASURES = ("leep",)
"""The measures for which that was tried."""

SPREAD = 1.0
"""How much features vary around their class means, in parts of how much class means vary; the same every way."""

HALF = 65_504
"""The most that half precision holds."""

Floats = NDArray[np.float32]


def likely_probes(bank: Bank, target: Target, measure: str, without: Collection[str] = ()) -> Iterator[ProbeChunk]:
    """The probes of a bank that may be among the nearest to a target, some at a time; of a small bank all.

    Records with a key in ``without`` take no place of another, but may be among them.

    Raises:
        BankError: a record that is read is damaged.
    """
    if measure not in MEASURES:
        yield from bank.probes()
        return
    place = sketch_folder(bank)
    last, hidden = 0, np.array(_marks(without), dtype=np.uint64)
    for sketch in _stored(place):
        found = _chosen(bank, sketch.likely(target, hidden))
        if found is None:
            _forget(place, sketch.after)
            break
        yield from found
        last = sketch.last
    yield from _drawing(bank, place, last)


def sketch_folder(bank: Bank) -> Path:
    """Where a bank's sketches are: beside its file; in the user's cache where it is on a server, or read-only."""
    url = bank.engine.url
    if url.get_backend_name() == "sqlite" and not url.query and url.database:
        path = Path(url.database)
        folder = path.with_name(f"{path.name}.sketches")
        if folder.is_dir() or os.access(path.resolve().parent, os.W_OK):
            return folder
    from platformdirs import user_cache_path

    name = hashlib.blake2b(f"{schema.shown(url)}\n{bank.store.url}".encode(), digest_size=16).hexdigest()
    return user_cache_path("kinprune") / "sketches" / name


@dataclass(frozen=True, eq=False)
class Part:
    """A sketch's records of as many classes: ``ids`` and a mark of each one's key ``[n]``, and their small probes."""

    ids: NDArray[np.int64]
    marks: NDArray[np.uint64]
    weights: NDArray[np.float16]
    biases: Floats

    def sources(self) -> Sources:
        """As probes over the sketch's own features; nobody asks for their means."""
        counts = np.full(len(self.ids), self.weights.shape[1], dtype=np.int64)
        return Sources(self.weights, self.biases, self.weights, counts)


COLUMNS = tuple(column.name for column in fields(Part))


@dataclass(frozen=True, eq=False)
class Sketch:
    """Records above the number ``after``, up to ``last``; features are seen as ``(f - mean) @ basis``."""

    after: int
    last: int
    mean: Floats
    basis: Floats
    parts: tuple[Part, ...]

    def scores(self, target: Target) -> NDArray[np.float64]:
        """About how well each record fits a target, in the order of ``parts``."""
        features = np.asarray((target.features - self.mean) @ self.basis, dtype=np.float32)
        seen = Target(features, target.labels, target.classes)
        return np.concatenate([transferability("leep", seen, part.sources()) for part in self.parts])

    def likely(self, target: Target, hidden: NDArray[np.uint64]) -> dict[int, int]:
        """The numbers of those that may be near, each with the mark of its key; not those with a ``hidden`` mark."""
        scores = self.scores(target)
        ids, marks = (np.concatenate([getattr(part, name) for part in self.parts]) for name in ("ids", "marks"))
        order = np.argsort(-scores, kind="stable")
        best = order[~np.isin(marks[order], hidden)][: math.ceil(LIKELY * len(ids))]
        return dict(zip(ids[best].tolist(), marks[best].tolist(), strict=True))


def _chosen(bank: Bank, likely: dict[int, int]) -> list[ProbeChunk] | None:
    """The likely ones' probes; None where they are of other records than the bank has."""
    chunks = list(bank.probes(ids=list(likely)))
    told = {
        number: mark for chunk in chunks for number, mark in zip(chunk.ids.tolist(), _marks(chunk.keys), strict=True)
    }
    same = all(likely[number] == mark for number, mark in told.items())
    return chunks if same and 2 * len(told) >= len(likely) else None


@dataclass(eq=False)
class Draft:
    """A sketch in the making: ``of`` the number before its first record and a first chunk, then ``add`` every chunk."""

    after: int
    mean: Floats
    basis: Floats
    reduction: Floats
    last: int = 0
    records: int = 0
    parts: dict[int, list[Part]] = field(default_factory=dict)

    @classmethod
    def of(cls, after: int, chunk: ProbeChunk) -> Draft:
        """What the first of its records say of the directions that matter."""
        stacks = [sources for _, sources in chunk.by_classes(np.arange(len(chunk)))]
        width = stacks[0].weights.shape[2]
        means = np.concatenate([_flat(stack.means) for stack in stacks])
        weights = np.concatenate([_flat(stack.weights, centred=True) for stack in stacks])
        mean = means.mean(axis=0)
        means -= mean
        between = (means.T @ means / len(means)).astype(np.float64)
        between[np.diag_indices(width)] += SPREAD * max(float(np.trace(between)) / width, 1e-12)
        root, inverse = _roots((weights.T @ weights / len(weights)).astype(np.float64))
        # The best low rank of W f over both: that of (W root^-1) (root features^1/2).
        vectors = np.linalg.svd(root @ _roots(between)[0])[0][:, : min(RANK, width)]
        basis, reduction = root @ vectors, inverse @ vectors
        return cls(after, *(array.astype(np.float32) for array in (mean, basis, reduction)))

    def add(self, chunk: ProbeChunk) -> None:
        """Take in some records, with higher numbers than those before."""
        marks = np.array(_marks(chunk.keys), dtype=np.uint64)
        for places, sources in chunk.by_classes(np.arange(len(chunk))):
            columns = np.column_stack([self.reduction, self.mean])
            products = _flat(sources.weights) @ columns
            shaped = products.reshape(*sources.biases.shape, -1)
            shaped[:, :, -1] += sources.biases
            shaped -= shaped.mean(axis=1, keepdims=True)
            weights = np.clip(shaped[:, :, :-1], -HALF, HALF).astype(np.float16)
            part = Part(chunk.ids[places], marks[places], weights, shaped[:, :, -1].copy())
            self.parts.setdefault(weights.shape[1], []).append(part)
        self.last = int(chunk.ids[-1])
        self.records += len(chunk)

    def sketch(self) -> Sketch:
        """What has come together."""
        joined = (
            Part(*(np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS))
            for _, parts in sorted(self.parts.items())
        )
        return Sketch(self.after, self.last, self.mean, self.basis, tuple(joined))


def _drawing(bank: Bank, place: Path, last: int) -> Iterator[ProbeChunk]:
    """All probes above a number, and a sketch of them where they are many."""
    draft: Draft | None = None
    for chunk in bank.probes(after=last):
        if draft is None and _highest(bank) - last >= RECORDS:  # else what follows is too little
            draft = Draft.of(last, chunk)
        last = int(chunk.ids[-1])
        if draft is not None:
            draft.add(chunk)
            if draft.records >= RECORDS:
                _write(place, draft.sketch())
                draft = None
        yield chunk


@retried
def _highest(bank: Bank) -> int:
    with schema.reading(bank.engine) as connection:
        return int(connection.execute(select(func.coalesce(func.max(schema.probe.c.record), 0))).scalar_one())


def _flat(array: NDArray[np.generic], *, centred: bool = False) -> Floats:
    """``[n, c, d]`` as rows; *centred* less their mean over classes, which no softmax sees."""
    wide = torch.from_numpy(array).float()
    if centred:
        wide -= wide.mean(dim=1, keepdim=True)
    return np.asarray(wide.reshape(-1, wide.shape[2]).numpy())


def _roots(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The square root of a covariance, and that root's inverse; directions without variance get a little."""
    values, vectors = np.linalg.eigh(matrix)
    roots = np.sqrt(np.maximum(values, max(float(values[-1]), 1e-12) * 1e-7))
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _marks(keys: Iterable[str]) -> list[int]:
    """A number for each key, and so for what was asked: another bank's record of the same number has another."""
    encoded = (key.encode("utf-8", "surrogateescape") for key in keys)
    return [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") for key in encoded]


_NAME = re.compile(r"(\d{20})-(\d{20})-([0-9a-f]{64})\.safetensors")


def _files(place: Path) -> list[tuple[int, int, str, Path]]:
    try:
        paths = sorted(place.iterdir())
    except OSError:
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in paths)
    return [(int(match[1]), int(match[2]), match[3], path) for match, path in matches if match]


def _stored(place: Path) -> Iterator[Sketch]:
    """The sketches that follow each other from a bank's first record, as far as they are whole."""
    last = 0
    for after, up_to, digest, path in _files(place):
        if after != last:
            continue  # of two processes that drew the same one is enough
        sketch = _read(path, after, up_to, digest)
        if sketch is None:
            _forget(place, after)
            return
        yield sketch
        last = up_to


def _read(path: Path, after: int, last: int, digest: str) -> Sketch | None:
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            return None
        arrays = read_arrays(content)
        counts = sorted(int(name.partition(".")[2]) for name in arrays if name.startswith("ids."))
        parts = (Part(*(arrays[f"{name}.{classes}"] for name in COLUMNS)) for classes in counts)
        return Sketch(after, last, arrays["mean"], arrays["basis"], tuple(parts))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _write(place: Path, sketch: Sketch) -> None:
    """Whole or not at all; without a sketch a bank is only slower."""
    arrays: dict[str, NDArray[Any]] = {"mean": sketch.mean, "basis": sketch.basis}
    for part in sketch.parts:
        arrays |= {f"{name}.{part.weights.shape[1]}": getattr(part, name) for name in COLUMNS}
    content = write_arrays(arrays)
    name = f"{sketch.after:020d}-{sketch.last:020d}-{hashlib.sha256(content).hexdigest()}.safetensors"
    partial = place / f"{name}.{secrets.token_hex(4)}.tmp"
    try:
        place.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(place / name)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def _forget(place: Path, after: int) -> None:
    """Remove the sketches from a number on: they are damaged, or of records that the bank does not have."""
    for first, _, _, path in _files(place):
        if first >= after:
            with suppress(OSError):
                path.unlink()
