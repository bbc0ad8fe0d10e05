"""What a bank keeps: a header that says for which model it is, and a record for each source task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinprune.backbones import BackboneSpec
from kinprune.calibration import Probe
from kinprune.errors import BankError
from kinprune.preprocessing import Preprocessing
from kinprune.units import Mask, UnitSpace


@dataclass(frozen=True, eq=False)
class Header:
    """The one model and unit space that all records of a bank are about.

    ``groups`` are the unit space's (name, size) in order, ``features`` the width of the backbone's features,
    ``backbone_weights`` the hash under which the bank stores the backbone's own weights.
    """

    spec: BackboneSpec
    preprocessing: Preprocessing
    backbone: str
    space: str
    stream: bool
    groups: tuple[tuple[str, int], ...]
    features: int
    backbone_weights: str

    @property
    def units(self) -> int:
        """The number of units of the space."""
        return sum(size for _, size in self.groups)


@dataclass(frozen=True)
class Accuracy:
    """Shares of a source task's test images right: the whole model, the pruned one in closed form, and fine-tuned."""

    dense: float
    start: float
    final: float


@dataclass(frozen=True, eq=False)
class Record:
    """What pruning for one source task taught.

    ``key`` names what was asked (see ``record_key``); a bank holds each once. ``ranking`` is int64 ``[u]``, each
    unit's place in its group; ``scores`` float16 ``[u]`` the units' last importance, normalised by group; ``mask`` the
    units that the pruned model kept, ``tensors`` its parameters and buffers, its classifier's among them.
    ``details`` holds JSON's own types: the data, the plan, versions, seconds.
    """

    key: str
    name: str
    classes: tuple[str, ...]
    ranking: NDArray[np.int64]
    scores: NDArray[np.float16]
    mask: Mask
    probe: Probe
    accuracy: Accuracy
    tensors: Mapping[str, Tensor]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A record's line in the list: all of it that is small. ``id`` is its number in this bank only."""

    id: int
    key: str
    name: str
    classes: tuple[str, ...]
    accuracy: Accuracy
    created: str
    weights: str
    weight_bytes: int
    details: Mapping[str, Any] = field(hash=False, default_factory=dict)


LATER = ("latency_ms", "train_memory")
"""Choices that plans of before did not know: where they are not made, the key is the one of before."""


def record_key(task_digest: str, asked: Mapping[str, Any]) -> str:
    """sha256 of a task's images and of how it was pruned: the same for the same work, wherever it is done."""
    text = json.dumps({"task": task_digest, "asked": _without_later(dict(asked))}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _without_later(asked: Any) -> Any:
    if not isinstance(asked, dict):
        return asked
    return {key: _without_later(value) for key, value in asked.items() if not (key in LATER and value is None)}


def check_space(header: Header, space: UnitSpace) -> None:
    """Refuse a unit space that is not the bank's."""
    if space.fingerprint != header.space:
        raise BankError(
            f"the bank's unit space is {header.space[:12]} ({header.units} units of {header.spec.name} at "
            f"{_side(header.preprocessing)} pixels, {'with' if header.stream else 'without'} the residual stream), "
            f"this one is {space.fingerprint[:12]} ({len(space)} units): use the bank's own model, size and stream"
        )


def check_backbone(header: Header, fingerprint: str, spec: BackboneSpec, preprocessing: Preprocessing) -> None:
    """Refuse, naming what differs, a backbone whose weights, architecture or preprocessing are not the bank's."""
    if fingerprint == header.backbone:
        return
    differing = [
        f"{name} is {ours}, the bank's is {its}"
        for name, ours, its in (
            ("the model", spec.architecture, header.spec.architecture),
            *(
                (f"its {key}", value, header.preprocessing.to_json()[key])
                for key, value in preprocessing.to_json().items()
            ),
        )
        if ours != its
    ] or ["its weights are not those that the bank was built from"]
    raise BankError(
        f"the bank belongs to another backbone: {'; '.join(differing)}: use the bank's own, or another bank"
    )


def check_record(header: Header, record: Record) -> None:
    """Refuse a record that is not complete, finite and of the bank's unit space, before anything is written."""
    for problem in (*record_problems(header, record), *tensor_problems(record.tensors)):
        raise BankError(f"the record cannot be stored: {problem}: make it with this bank's model and options")


def record_problems(header: Header, record: Record) -> Iterator[str]:
    """What is wrong with a record but for its tensors, in words; nothing where nothing is."""
    if not 0 < len(record.key) <= 64:
        yield f"its key has {len(record.key)} characters, expected 1 to 64 (see record_key)"
    if record.mask.fingerprint != header.space:
        yield "its mask is of another unit space than the bank's"
    fits = True
    for problem in _array_problems(header, record):
        fits = False
        yield problem
    if len(record.classes) < 2 or len(set(record.classes)) < len(record.classes):
        yield "it has fewer than two classes, or one twice"
    if fits:
        yield from _group_problems(header, record)
    for what, share in vars(record.accuracy).items():
        if not 0 <= share <= 1:
            yield f"its {what} accuracy is {share}, expected a share from 0 to 1"


def tensor_problems(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with a record's tensors, whatever its mask."""
    if not tensors:
        yield "it has no weights"
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield f"its weights {name} are not all finite"


def _array_problems(header: Header, record: Record) -> Iterator[str]:
    units, classes, width = header.units, len(record.classes), header.features
    for name, array, shape in (
        ("ranking", record.ranking, (units,)),
        ("scores", record.scores, (units,)),
        ("mask", record.mask.kept, (units,)),
        ("probe's weights", record.probe.weights, (classes, width)),
        ("probe's biases", record.probe.biases, (classes,)),
        ("class means", record.probe.means, (classes, width)),
        ("class counts", record.probe.counts, (classes,)),
    ):
        if array.shape != shape:
            yield f"its {name} are {list(array.shape)}, expected {list(shape)}"
        elif not np.isfinite(array).all():
            yield f"its {name} are not all finite"


def _group_problems(header: Header, record: Record) -> Iterator[str]:
    start = 0
    for name, size in header.groups:
        places, kept = record.ranking[start : start + size], record.mask.kept[start : start + size]
        if not np.array_equal(np.sort(places), np.arange(size)):
            yield f"its ranking of {name} is no order of units"
        if not kept.any():
            yield f"its mask keeps no unit of {name}"
        start += size


def _side(preprocessing: Preprocessing) -> str:
    height, width = preprocessing.image_size
    return str(height) if height == width else f"{height} x {width}"
