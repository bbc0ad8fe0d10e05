"""Which images a step trains on: those held back, the order of the others, and their random shifts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kinprune.tasks import Split

SHIFT = 0.125
"""The largest random shift, as a share of the image's side: the usual 4 pixels of 32."""


def hold_back(split: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """A split without ``fraction`` of each class's images, at least one, and those images.

    Drawn with ``seed``. (split, None) where ``fraction`` is 0 or a class has fewer than two images.
    Solve a closed-form head on the first part: a head that has seen the second one makes it a poor judge.
    """
    counts = torch.bincount(split.labels)
    if fraction == 0 or int(counts[counts > 0].min()) < 2:
        return split, None
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(split.labels), dtype=torch.bool)
    for label in counts.nonzero().flatten().tolist():
        members = order[split.labels[order] == label]
        held[members[: min(len(members) - 1, max(1, round(fraction * len(members))))]] = True
    return Split(split.images[~held], split.labels[~held]), Split(split.images[held], split.labels[held])


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of full batches, for ever; what is left of a pass is dropped, and drawn anew in the next."""
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def shift_and_flip(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Each image ``[n, c, h, w]`` moved by its own random offset, reflected at its borders; mirrored half the time.

    Offsets are uniform whole pixels up to an eighth of each side; images of a single row or column stay. They are drawn
    on the generator's device, so that they do not depend on where the images are.
    """
    count, _, height, width = images.shape
    rows, columns = (_reflected(count, side, generator) for side in (height, width))
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    index = torch.arange(count, device=images.device).view(-1, 1, 1)
    # Indexing [n, :, h, w] puts the channels last.
    return images[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _reflected(count: int, side: int, generator: torch.Generator) -> Tensor:
    """For each image, the source index of every pixel along a side: ``[count, side]``."""
    reach = int(SHIFT * side)
    offsets = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
    indices = (torch.arange(side) + offsets).abs()
    return (side - 1) - ((side - 1) - indices).abs()
