"""Kin: the source tasks of a bank that are nearest to a target task, or others in their place as controls."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinprune.backbones import Backbone
from kinprune.bank import Bank, Entry, ProbeChunk
from kinprune.calibration import Probe
from kinprune.errors import BankError
from kinprune.evaluation import logits
from kinprune.preprocessing import Preprocessing
from kinprune.transferability import Sources, Target, nearest, transferability
from kinprune.units import Mask, UnitSpace, extract

Which = Literal["nearest", "farthest", "random", "all"]

NEIGHBOURS = 10
"""How many neighbours vote unless something else is asked for."""


@dataclass(frozen=True)
class Search:
    """Whom to ask: the ``count`` ``nearest`` source tasks by a ``measure`` of transferability.

    ``farthest``, ``random`` and ``all`` are controls: what they give is not due to kinship. ``exact`` re-ranks so many
    of the nearest by a pass of the target's images through their own pruned models. ``seed`` draws the random ones.
    """

    measure: str = "leep"
    count: int = NEIGHBOURS
    which: Which = "nearest"
    exact: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.exact < 0:
            raise BankError(
                f"{self.count} neighbours and {self.exact} exact ones were asked for, expected at least 1 and 0"
            )
        if self.which not in get_args(Which):
            raise BankError(f"there are no '{self.which}' neighbours, expected one of: {', '.join(get_args(Which))}")


@dataclass(frozen=True)
class Neighbour:
    """A source task beside a target: its line in the bank, how near it is, and the class names that both have."""

    entry: Entry
    similarity: float
    shared: tuple[str, ...]


def find_kin(
    bank: Bank, target: Target, classes: Sequence[str], search: Search | None = None, *, without: Collection[str] = ()
) -> list[Neighbour]:
    """The neighbours of a target in a bank, nearest first; equally near ones by key, whatever the bank's order.

    Probes are read and compared some thousands at a time. ``classes`` are the target's class names, only to say which
    are shared; records with a key in ``without`` are left out. ``exact`` is not done here (see ``rank_exactly``).

    Raises:
        BankError: the bank holds no record, or a record is damaged.
        TransferabilityError: the measure cannot be computed.
    """
    search = Search() if search is None else search
    ids: list[NDArray[np.int64]] = []
    keys: list[str] = []
    scores: list[NDArray[np.float64]] = []
    for chunk in bank.probes():
        for places in _alike(chunk, without):
            sources = sources_of([chunk.probes[place] for place in places])
            if search.which == "nearest":
                count = min(_wanted(search), len(places))
                best, values = nearest(search.measure, target, sources, count, seed=search.seed)
                places = places[best]
            else:
                values = transferability(search.measure, target, sources)
            ids.append(chunk.ids[places])
            keys.extend(chunk.keys[place] for place in places)
            scores.append(values)
    if not keys:
        raise BankError(f"the bank {bank.address} holds no record to learn from: fill it with 'kinprune bank build'")
    chosen = _choose(np.concatenate(scores), keys, search)
    numbers, similarities = np.concatenate(ids)[chosen], np.concatenate(scores)[chosen]
    return [
        Neighbour(entry, float(similarity), tuple(name for name in entry.classes if name in classes))
        for entry, similarity in zip(bank.entries(numbers.tolist()), similarities, strict=True)
    ]


def rank_exactly(
    neighbours: Sequence[Neighbour],
    bank: Bank,
    backbone: Backbone,
    space: UnitSpace,
    images: Tensor,
    target: Target,
    search: Search,
    device: str = "cpu",
) -> list[Neighbour]:
    """The first ``search.exact`` neighbours compared again, on the answers of their own pruned models.

    This is the papers' own form of similarity, one pass of ``images`` (uint8 ``[n, 3, h, w]``, those of ``target``)
    a neighbour. Their similarities change; the others follow, as they were. "class-mean" knows no answers.
    """
    if search.measure == "class-mean":
        raise BankError("class-mean compares features, not answers: leave out --exact, or take --measure leep")
    again = []
    for neighbour in neighbours[: search.exact]:
        answers = _answers(bank, backbone, space, neighbour.entry, images, device)
        one = _own_sources(answers.shape[1])
        seen = Target(answers, target.labels, target.classes)
        again.append(Neighbour(neighbour.entry, float(transferability(search.measure, seen, one)[0]), neighbour.shared))
    again.sort(key=lambda neighbour: (-neighbour.similarity, neighbour.entry.key))
    return [*again, *neighbours[search.exact :]][: search.count]


def _alike(chunk: ProbeChunk, without: Collection[str]) -> Iterator[NDArray[np.int64]]:
    """The places of probes that may be compared, those of about as many classes together.

    They are padded to the most classes of any: one broad task among thousands of small ones would make all of them
    large. Within a factor of two, padding at most doubles them. They are in the order of their keys: the last bit of a
    product depends on where in a matrix a row stands, and a bank's order is to mean nothing.
    """
    seen = sorted((key, place) for place, key in enumerate(chunk.keys) if key not in without)
    places = np.array([place for _, place in seen], dtype=np.int64)
    levels = np.array([(len(chunk.probes[place].biases) - 1).bit_length() for place in places], dtype=np.int64)
    for level in np.unique(levels):
        yield places[levels == level]


def sources_of(probes: Sequence[Probe]) -> Sources:
    """Probes stacked, padded to the most classes of any."""
    counts = np.array([len(probe.biases) for probe in probes], dtype=np.int64)
    most, width = int(counts.max()), probes[0].weights.shape[1]
    weights = np.zeros((len(probes), most, width), dtype=np.float32)
    means, biases = np.zeros_like(weights), np.zeros((len(probes), most), dtype=np.float32)
    for place, probe in enumerate(probes):
        weights[place, : counts[place]] = probe.weights
        means[place, : counts[place]] = probe.means
        biases[place, : counts[place]] = probe.biases
    return Sources(weights, biases, means, counts)


def _wanted(search: Search) -> int:
    return max(search.count, search.exact)


def _choose(scores: NDArray[np.float64], keys: list[str], search: Search) -> NDArray[np.int64]:
    order = np.array(sorted(range(len(keys)), key=lambda place: (-scores[place], keys[place])), dtype=np.int64)
    if search.which == "all":
        return order
    if search.which == "farthest":
        return order[-search.count :]
    if search.which == "random":
        # Drawn by key, so that the order in which a bank was filled does not matter.
        by_key = np.argsort(np.array(keys), kind="stable")
        drawn = np.random.default_rng(search.seed).permutation(len(keys))[: search.count]
        chosen = set(by_key[drawn].tolist())
        return np.array([place for place in order if int(place) in chosen], dtype=np.int64)
    return order[: _wanted(search)]


def _answers(
    bank: Bank, backbone: Backbone, space: UnitSpace, entry: Entry, images: Tensor, device: str
) -> NDArray[np.float32]:
    """What a record's pruned model answers: its logits ``[n, c]``."""
    kept = bank.lessons([entry.id]).kept[0]
    model = extract(backbone.model, space, Mask(kept, space.fingerprint))
    head = model.get_submodule(backbone.head)
    tensors = bank.tensors(entry)
    weight = tensors[f"{backbone.head}.weight"].float()
    assert isinstance(head, torch.nn.Linear)
    head.weight = torch.nn.Parameter(torch.empty_like(weight))
    if head.bias is not None:
        head.bias = torch.nn.Parameter(torch.empty(len(weight)))
    head.out_features = len(weight)
    model.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    )
    preprocessing: Preprocessing = bank.header.preprocessing
    return logits(model, images, preprocessing, device=device).numpy()


def _own_sources(classes: int) -> Sources:
    """The probe that gives back what it is given."""
    one = np.eye(classes, dtype=np.float32)[None]
    return Sources(one, np.zeros((1, classes), np.float32), one.copy(), np.array([classes], dtype=np.int64))
