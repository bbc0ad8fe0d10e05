"""The neighbours of an adaptation as rows, with sample images of their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kinprune.adaptation import Adapted
from kinprune.kin import Neighbour
from kinprune.report.pictures import thumbnail
from kinprune.tasks import DecodedTask

PICTURED = 12
"""Neighbours that are shown with pictures, and classes of each; there may be hundreds."""


@dataclass(frozen=True)
class ClassCard:
    """A class: its name, whether source and target task both have it, and the data URI of an image of it."""

    name: str
    shared: bool
    picture: str | None


@dataclass(frozen=True)
class NeighbourRow:
    """A source task: how near it is, and how much it counted. ``bar`` is its weight as a share of the greatest.

    ``classes`` are some of its classes, those that are shared first among them, and ``more`` the number of the others.
    """

    rank: int
    id: int
    name: str
    classes: tuple[ClassCard, ...]
    more: int
    similarity: float
    weight: float
    bar: float
    accuracy: float


def neighbour_rows(adapted: Adapted, samples: Mapping[str, Tensor] | None = None) -> tuple[NeighbourRow, ...]:
    """A row for every neighbour, nearest first."""
    pictures: dict[str, str] = {}
    greatest = max(adapted.weights)
    return tuple(
        NeighbourRow(
            rank=rank,
            id=neighbour.entry.id,
            name=neighbour.entry.name,
            classes=tuple(
                ClassCard(name, name in neighbour.shared, _picture(name, samples, pictures, rank))
                for name in _told(neighbour)
            ),
            more=len(neighbour.entry.classes) - len(_told(neighbour)),
            similarity=neighbour.similarity,
            weight=weight,
            bar=weight / greatest,
            accuracy=neighbour.entry.accuracy.final,
        )
        for rank, (neighbour, weight) in enumerate(zip(adapted.neighbours, adapted.weights, strict=True), 1)
    )


def _told(neighbour: Neighbour) -> list[str]:
    """The classes of a neighbour that are shown: all of a narrow task, some of a broad one."""
    names = neighbour.entry.classes
    if len(names) <= PICTURED:
        return list(names)
    return sorted(names, key=lambda name: name not in neighbour.shared)[:PICTURED]


def target_classes(task: DecodedTask) -> tuple[ClassCard, ...]:
    """The task's own classes, each with its first training image; only names where there are very many."""
    cards = []
    for label, name in enumerate(task.classes):
        (places,) = (task.train.labels == label).nonzero(as_tuple=True)
        with_picture = len(places) and len(task.classes) <= 4 * PICTURED
        cards.append(ClassCard(name, False, thumbnail(task.train.images[places[0]]) if with_picture else None))
    return tuple(cards)


def _picture(name: str, samples: Mapping[str, Tensor] | None, known: dict[str, str], rank: int) -> str | None:
    images = None if samples is None else samples.get(name)
    if images is None or not len(images) or rank > PICTURED:
        return None
    if name not in known:
        known[name] = thumbnail(images[0])
    return known[name]
