"""Kin: the source tasks of a bank that are nearest to a target task, or others in their place as controls."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinprune.backbones import Backbone
from kinprune.bank import Bank, Entry, ProbeChunk
from kinprune.bank.listing import draw
from kinprune.bank.schema import shown
from kinprune.bank.sketches import likely_probes
from kinprune.calibration import Probe
from kinprune.errors import BankError
from kinprune.evaluation import logits
from kinprune.preprocessing import Preprocessing
from kinprune.transferability import Leaders, Sources, Target, transferability
from kinprune.units import Mask, UnitSpace, extract

Which = Literal["nearest", "farthest", "random", "all"]

Ranked = list[tuple[str, float]]
"""Keys and similarities of records."""

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

    Probes are read and compared a thousand at a time, and only those that lead so far are kept (see ``Leaders``):
    memory is that of what is asked for, not of the bank. ``classes`` are the target's class names, only to say which
    are shared; records with a key in ``without`` are left out. ``exact`` is not done here (see ``rank_exactly``).

    Raises:
        BankError: the bank holds no record, or a record is damaged.
        TransferabilityError: the measure cannot be computed.
    """
    search = Search() if search is None else search
    if search.which == "all":
        ranked = _scored(_ahead(bank.probes()), target, search, without)
    elif search.which == "random":
        drawn = draw(bank, search.count, search.seed, without)
        ranked = _scored(bank.probes(ids=drawn), target, search, without)
    else:
        ranked = _leading(bank, target, search, without)
    if not ranked:
        raise BankError(
            f"the bank {shown(bank.engine.url)} holds no record to learn from: fill it with 'kinprune bank build'"
        )
    entries = bank.find([key for key, _ in ranked])
    _check_there(bank, ranked, entries)
    return [
        Neighbour(entries[key], similarity, tuple(name for name in entries[key].classes if name in classes))
        for key, similarity in ranked
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


def _leading(bank: Bank, target: Target, search: Search, without: Collection[str]) -> Ranked:
    """Those at the near end of the bank, or at its far end."""
    far = search.which == "farthest"
    count = search.count if far else _wanted(search)
    leaders = Leaders(search.measure, target, count, farthest=far, seed=search.seed)
    likely = bank.probes() if far else likely_probes(bank, leaders.seen, search.measure, without)
    for chunk in _ahead(likely):
        for places, sources in chunk.by_classes(_by_key(chunk, without)):
            leaders.add(sources, np.array([chunk.keys[place] for place in places]))
    keys, scores = leaders.best()
    ranked = list(zip(keys.tolist(), scores.tolist(), strict=True))
    return _nearest_first(ranked) if far else ranked


def _scored(chunks: Iterable[ProbeChunk], target: Target, search: Search, without: Collection[str]) -> Ranked:
    """All of some probes."""
    ranked: Ranked = []
    for chunk in chunks:
        for places, sources in chunk.by_classes(_by_key(chunk, without)):
            scores = transferability(search.measure, target, sources).tolist()
            ranked += zip((chunk.keys[place] for place in places), scores, strict=True)
    return _nearest_first(ranked)


def _nearest_first(ranked: Ranked) -> Ranked:
    return sorted(ranked, key=lambda pair: (-pair[1], pair[0]))


def _by_key(chunk: ProbeChunk, without: Collection[str]) -> NDArray[np.int64]:
    """The places of those that are to be compared in the order of their keys.

    The last bit of a product depends on where in a matrix a row stands, and a bank's order is to mean nothing.
    """
    return np.array(
        [place for key, place in sorted(zip(chunk.keys, range(len(chunk)), strict=True)) if key not in without],
        dtype=np.int64,
    )


def _ahead(chunks: Iterator[ProbeChunk]) -> Iterator[ProbeChunk]:
    """Each chunk while a thread reads the next: SQLite and hashing let go of Python's lock, and so do products."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, chunks, None)
        while (chunk := following.result()) is not None:
            following = reader.submit(next, chunks, None)
            yield chunk


def _check_there(bank: Bank, ranked: Ranked, entries: Container[str]) -> None:
    gone = [key for key, _ in ranked if key not in entries]
    if gone:
        raise BankError(
            f"the record {gone[0][:12]} was altered or removed while the bank was read: try again; if that does not "
            f"help, 'kinprune bank verify' says what is damaged"
        )


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
