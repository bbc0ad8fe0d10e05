"""The closed-form start of an extracted model: reconstruction, batch norm and head, without a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter

import torch
from torch import Tensor, nn

from kinprune.calibration.batch_norm import reestimate_batch_norm
from kinprune.calibration.head import HeadMethod, HeadSolution, check_labels, fit_head, head_inputs
from kinprune.calibration.reconstruction import LayerReconstruction, reconstruct
from kinprune.calibration.residual import ReconstructionLayer
from kinprune.calibration.statistics import Moments, match_batch_norm
from kinprune.preprocessing import Preprocessing

JUDGES = 256
"""How many images starts are compared on."""
LEAST_JUDGES = 8
"""Images of a class below which all of them both make the starts and judge them."""


@dataclass(frozen=True)
class ClosedForm:
    """What the closed-form start did, and the seconds each part took over all the starts that were tried.

    ``head`` holds the leave-one-out accuracy and loss of the model as it was left, ``judging`` those on the images
    that only judged, by which starts can be compared, and ``judged`` is their loss (None where there is none).
    ``reconstructed`` says whether the reconstruction was kept, and ``layers`` what it did to each layer, kept or not;
    ``batch_norms`` is the number of batch norms matched or counted again in the model as it was left. Where that is
    none of those that the model has, ``trainable`` is the best start with its batch norm repaired, a state of the
    model: it answers worse now, but its channels neither vanish nor saturate, so that training gets further from
    there.
    """

    head: HeadSolution
    batch_norms: int
    reconstructed: bool
    layers: tuple[LayerReconstruction, ...]
    seconds_reconstruction: float
    seconds_batch_norm: float
    seconds_head: float
    judging: HeadSolution
    trainable: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)

    @property
    def judged(self) -> float | None:
        """The loss by which starts can be compared."""
        return self.judging.loss


@dataclass(frozen=True, eq=False)
class _Start:
    """A state of the model, and the head's inputs in it for the images that judge."""

    head: HeadSolution
    features: Tensor
    norms: int
    reconstructed: bool
    state: dict[str, Tensor]


def closed_form(
    model: nn.Module,
    head: str,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    preprocessing: Preprocessing,
    *,
    dense: nn.Module | None = None,
    layers: Sequence[str | ReconstructionLayer] = (),
    channels: Mapping[str, Sequence[int]] | None = None,
    method: HeadMethod = "ridge",
    seed: int = 0,
    intact: bool = False,
) -> ClosedForm:
    """Bring an extracted model as far as it gets without a step: reconstruct, repair batch norm, solve the head.

    ``layers`` are reconstructed towards ``dense`` where both are given. Batch norm is matched to ``dense`` where that
    is given with ``channels`` (see ``match_batch_norm``), else counted again. Neither serves every task, so each is
    done and left out in turn and the start of lowest leave-one-out cross-entropy of its head stays; where there is
    none (one image a class), that is the reconstructed one with the statistics it had. Up to half of the images, about
    ``JUDGES`` and the same number of each class, only judge: a reconstruction makes the features of its own images
    look better than they are. Where a class has fewer than twice ``LEAST_JUDGES``, there are too few for that, and all
    images do both (see ``can_judge``). Of a model that is ``intact``, trained as it is, nothing but its head is
    changed then; and only what is surely better by the images that judge, where there are some. The head that stays is
    solved on all. ``images`` are uint8 ``[n, 3, h, w]`` and ``labels`` int64 ``[n]``: leave out those that are to
    guard a fine-tuning. Works in place.
    """
    check_labels(images, labels, num_classes)
    judges, builders = _parts(labels, num_classes, seed)
    trial = _Trial(
        model, head, images, labels, num_classes, preprocessing, dense, channels, method, seed, judges, builders
    )
    solved: tuple[LayerReconstruction, ...] = ()
    original = _state(model)
    as_it_is = intact and not can_judge(labels, num_classes)
    starts = [trial.start(0, False)] if as_it_is else trial.starts(reconstructed=False)
    if dense is not None and layers and not as_it_is:
        _restore(model, original)
        with trial.timed("reconstruction"):
            solved = reconstruct(model, dense, layers, trial.made_of, preprocessing, seed=seed)
        starts += trial.starts(reconstructed=True)
    better = [start for start in starts if start.head.surely_beats(starts[0].head)] if intact else starts
    best = min(better or starts[:1], key=_worth)
    trainable = None
    if not best.norms and any(start.norms for start in starts):
        trial.settle(min((start for start in starts if start.norms), key=_worth))
        trainable = _state(model)
    solution = trial.settle(best)
    return ClosedForm(
        solution,
        best.norms,
        best.reconstructed,
        solved,
        trial.seconds["reconstruction"],
        trial.seconds["batch_norm"],
        trial.seconds["head"],
        best.head,
        trainable,
    )


@dataclass(eq=False)
class _Trial:
    """The starts of one model, made of the images at ``builders`` and tried on those at ``judges``."""

    model: nn.Module
    head: str
    images: Tensor
    labels: Tensor
    num_classes: int
    preprocessing: Preprocessing
    dense: nn.Module | None
    channels: Mapping[str, Sequence[int]] | None
    method: HeadMethod
    seed: int
    judges: Tensor
    builders: Tensor
    noted: dict[str, Moments] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"reconstruction": 0.0, "batch_norm": 0.0, "head": 0.0})

    @cached_property
    def made_of(self) -> Tensor:
        return self.images[self.builders]

    def starts(self, *, reconstructed: bool) -> list[_Start]:
        """The model as it is, and with its batch norm repaired where it has any."""
        found = [self.start(0, reconstructed)]
        norms = self.repair_batch_norm()
        if norms:
            found.append(self.start(norms, reconstructed))
        return found

    def start(self, norms: int, reconstructed: bool) -> _Start:
        with self.timed("head"):
            features = self.features(self.judges)
            head = self.fit(features, self.labels[self.judges])
        return _Start(head, features, norms, reconstructed, _state(self.model))

    def repair_batch_norm(self) -> int:
        with self.timed("batch_norm"):
            if self.dense is None or self.channels is None:
                return reestimate_batch_norm(self.model, self.made_of, self.preprocessing, seed=self.seed)
            return match_batch_norm(
                self.model,
                self.dense,
                self.channels,
                self.made_of,
                self.preprocessing,
                seed=self.seed,
                noted=self.noted,
            )

    def features(self, chosen: Tensor) -> Tensor:
        return head_inputs(self.model, self.head, self.images[chosen], self.preprocessing)

    def fit(self, features: Tensor, labels: Tensor) -> HeadSolution:
        return fit_head(self.model, self.head, features, labels, self.num_classes, method=self.method)

    def settle(self, start: _Start) -> HeadSolution:
        """Put the model into a start's state, with a head that is solved on all images."""
        _restore(self.model, start.state)
        if len(self.judges) == len(self.labels):
            return start.head
        with self.timed("head"):
            features = start.features.new_empty(len(self.labels), start.features.shape[1])
            features[self.judges] = start.features
            features[self.builders] = self.features(self.builders)
            return self.fit(features, self.labels)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self.seconds[part] += perf_counter() - started


def can_judge(labels: Tensor, num_classes: int) -> bool:
    """Whether images are enough for some of them to do nothing but judge what was made of the others."""
    return int(torch.bincount(labels, minlength=num_classes).min()) >= 2 * LEAST_JUDGES


def _parts(labels: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images that judge and of those that starts are made of, drawn with ``seed``; see above."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = [order[labels[order] == label] for label in range(num_classes)]
    if not can_judge(labels, num_classes):
        every = torch.arange(len(labels))
        return every, every
    most = max(LEAST_JUDGES, -(-JUDGES // num_classes))
    counts = [min(most, len(images) // 2) for images in by_class]
    judges = [images[:count] for images, count in zip(by_class, counts, strict=True)]
    builders = [images[count:] for images, count in zip(by_class, counts, strict=True)]
    return torch.cat(judges).sort().values, torch.cat(builders).sort().values


def _worth(start: _Start) -> tuple[float, bool, bool]:
    loss = 0.0 if start.head.loss is None else start.head.loss
    return loss, not start.reconstructed, start.norms > 0


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the tensors back, but for those of a head whose width has changed: it is solved again."""
    for name, tensor in model.state_dict().items():
        if tensor.shape == state[name].shape:
            tensor.copy_(state[name])
