"""Baselines that the product does not have. Each gives a start at a keep ratio, repaired like all others.

What a baseline learns once a bank (``pretrained``) is no part of its seconds: ``details`` then names it in ``shared``
and tells what it took in ``shared_seconds``.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import peer
from benchmarks.study.pretrained import (
    Pretrained,
    cache_folder,
    reptile_weights,
    sources_of,
)
from benchmarks.study.starts import Start, cut
from benchmarks.study.targets import TargetTask
from kinprune.calibration import closed_form, head_inputs, solve_probe
from kinprune.evaluation import lay_out, logits
from kinprune.importance import Batch, Scores, draw_batches, normalise, score
from kinprune.preprocessing import normalise as normalise_images
from kinprune.selection import Budget, select
from kinprune.training.batches import shift_and_flip
from kinprune.units import UnitSpace

SCORE_IMAGES, SCORE_BATCH = 256, 64
"""Images that importance is read from, as many as a ``kinprune.Plan`` reads unless told otherwise."""

WEAK_MASKS = 10
WEAK_IMAGES = 32
"""Images of each weak mask."""
NOISE = 0.1
"""The standard deviation of the noise on a tensor, as a share of the tensor's own."""

PAIRS = 16
"""Pairs of views whose gradients are summed before they are squared."""
STUDENT_HEAT, TEACHER_HEAT = 0.1, 0.04
"""DINO's temperatures (Caron et al. 2021)."""
JITTER = 0.4
"""The largest change of a view's brightness, as a share."""


def weak_masks(target: TargetTask, keep: float) -> Start:
    """The average of cheap masks, after Instant Soup (Jaiswal et al., ICML 2023, arXiv 2306.10460).

    That averages unstructured masks of a handful of training iterations under varied protocols on parts of the data.
    Here ``WEAK_MASKS`` structured masks are made of Taylor scores, each of its own ``WEAK_IMAGES`` images in a model
    with Gaussian noise on its weights, which stands for the varied iterations. How many masks keep a unit is its
    score; ties go by its mean importance.
    """
    started = time.perf_counter()
    votes, means = weak_votes(target, keep)
    mask = select(target.space, votes, Budget(keep=keep), ties=(means,)).mask
    agreement = float(votes[mask.kept].mean())
    return cut(target, mask, time.perf_counter() - started, details={"agreement": round(agreement, 4)})


def weak_votes(target: TargetTask, keep: float) -> tuple[Scores, Scores]:
    """The share of the weak masks that keep each unit, and the unit's mean normalised importance: each ``[u]``."""
    kept, scores = [], []
    for seed in range(WEAK_MASKS):
        noisy = _noisy(target.dense, seed)
        found = _taylor(noisy, target, images=WEAK_IMAGES, batch=WEAK_IMAGES, seed=seed)
        kept.append(select(target.space, found, Budget(keep=keep)).mask.kept)
        scores.append(found)
    return np.mean(kept, axis=0), np.mean(scores, axis=0)


def label_free(target: TargetTask, keep: float) -> Start:
    """One ranking without labels, after SnapViT (Simoncini et al. 2025, arXiv 2510.17700).

    That adds a diagonal of the Hessian, from gradients of a self-supervised loss (DINO's), to correlations between
    blocks that an evolutionary algorithm finds. Here only the first part is done, for gates on units: the squared
    gradients of the loss, averaged over batches. See ``label_free_scores``.
    """
    started = time.perf_counter()
    mask = select(target.space, label_free_scores(target), Budget(keep=keep)).mask
    return cut(target, mask, time.perf_counter() - started)


def label_free_scores(target: TargetTask, seed: int = 0) -> Scores:
    """Importance ``[u]`` from images alone: Taylor's under the consistency of two augmented views.

    The loss is DINO's with the backbone as its own teacher and without a projection head: features at the head's input,
    of length 1, are the logits; those of one view, less their mean over all images and at a lower temperature, are the
    other's soft labels. Views are shifted and of another brightness. No label is read, nor the head made of labels.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(target.fit), generator=generator)[:SCORE_IMAGES]
    images = target.fit.images[order]
    views = [_view(images, generator) for _ in range(2)]
    student = _featurer(target.dense, target.backbone.head)
    features = [head_inputs(student, target.backbone.head, view, target.task.preprocessing).float() for view in views]
    lengths = [functional.normalize(feature) for feature in features]
    centre = torch.cat(lengths).mean(0)
    wanted = [((feature - centre) / TEACHER_HEAT).softmax(1) for feature in lengths]
    batches = [
        Batch(normalise_images(view[chosen], target.task.preprocessing), labels[chosen])
        for view, labels in zip(views, reversed(wanted), strict=True)
        for chosen in torch.split(torch.arange(len(images)), PAIRS)
    ]
    return normalise(target.space, score("taylor", student, target.space, batches, seed=seed))


def torch_pruning(target: TargetTask, keep: float) -> Start:
    """torch-pruning's own Taylor pruner, on the units that Kinprune prunes and as many of each layer.

    Layers whose outputs Kinprune keeps whole are ignored, and each other layer's ratio is set so that its count comes
    out as Kinprune's: torch-pruning rounds down, to nothing at times, and leaves a layer alone then. Whole heads are
    removed. The gradients are those of Kinprune's scoring images. Afterwards batch norms are counted again and the head
    is solved, without reconstruction. ``details`` has the parameters it came to and those asked for.

    Raises RuntimeError where torch-pruning fails on the model, leaves it as it was, or breaks it.
    """
    started = time.perf_counter()
    name = target.backbone.spec.name
    wanted = select(target.space, np.zeros(len(target.space)), Budget(keep=keep)).costs.parameters
    model = copy.deepcopy(target.dense)
    lay_out(model, fast=False)
    try:
        _step(model, target, keep)
        logits(model, target.fit.images[:2], target.task.preprocessing)
    except Exception as error:
        raise RuntimeError(f"torch-pruning fails on {name}: {type(error).__name__}: {error}") from error
    parameters = _parameters(model)
    if parameters == _parameters(target.dense):
        raise RuntimeError(f"torch-pruning removed nothing of {name}, without an error")
    lay_out(model)
    closed = closed_form(
        model,
        target.backbone.head,
        target.fit.images,
        target.fit.labels,
        len(target.task.classes),
        target.task.preprocessing,
    )
    details = {
        "reconstructed": closed.reconstructed,
        "judged": closed.judged,
        "parameters": parameters,
        "parameters_asked": wanted,
    }
    return Start(model, closed.trainable, time.perf_counter() - started, details)


def reptile(target: TargetTask, keep: float, *, episodes: int) -> Start:
    """Taylor's one-shot pruning of a meta-learned start: the backbone after Reptile over the bank's source tasks.

    See ``pretrained.reptile_weights``. The repair aims at the whole model, every method's teacher, and not at the
    meta-learned one.
    """
    learned = reptile_weights(target.bank, sources_of(target.bank), cache_folder(target.bank), episodes=episodes)
    started = time.perf_counter()
    meta = copy.deepcopy(target.dense)
    _put(meta, learned.state)
    head, fit = target.backbone.head, target.fit
    features = head_inputs(meta, head, fit.images, target.task.preprocessing)
    solve_probe(meta, head, features, fit.labels, len(target.task.classes))
    scores = _taylor(meta, target, images=SCORE_IMAGES, batch=SCORE_BATCH, seed=0)
    mask = select(target.space, scores, Budget(keep=keep)).mask
    taken = time.perf_counter() - started
    return cut(target, mask, taken, whole=meta, details=_shared("Reptile's episodes", learned))


def _taylor(model: nn.Module, target: TargetTask, *, images: int, batch: int, seed: int) -> Scores:
    """Normalised Taylor importance of a model's units on images of the target."""
    batches = draw_batches(target.fit, target.task.preprocessing, images, batch, seed=seed)
    return normalise(target.space, score("taylor", model, target.space, batches, seed=seed))


@torch.no_grad()
def _noisy(model: nn.Module, seed: int) -> nn.Module:
    """A copy with Gaussian noise on every parameter, ``NOISE`` times the parameter's own standard deviation."""
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in noisy.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * parameter.std(correction=0), alpha=NOISE)
    return noisy


def _view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image ``uint8 [n, 3, h, w]`` shifted and of another brightness."""
    factors = 1 + JITTER * (2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1)
    return (shift_and_flip(images, generator, flip=False) * factors).clamp(0, 255).to(torch.uint8)


def _featurer(model: nn.Module, head: str) -> nn.Module:
    """A copy whose answers are its head's inputs, of length 1, divided by the student's temperature.

    The head becomes the identity and stays a Linear of its name: units that it takes in are scored like all others.
    """
    featurer = copy.deepcopy(model)
    layer: Any = featurer.get_submodule(head)
    layer.out_features = layer.in_features
    layer.weight = nn.Parameter(torch.eye(layer.in_features))
    layer.bias = None
    layer.register_forward_hook(lambda _module, _inputs, output: functional.normalize(output) / STUDENT_HEAT)
    return featurer


def _step(model: nn.Module, target: TargetTask, keep: float) -> None:
    """Prune a model in place with torch-pruning."""
    import torch_pruning as tp

    space = target.space
    counts = space.counts(select(space, np.zeros(len(space)), Budget(keep=keep)).mask.kept).tolist()
    modes = [(module, module.training) for module in model.modules()]
    model.eval().requires_grad_(True)
    with _plain_attention(model):
        for batch in draw_batches(target.fit, target.task.preprocessing, SCORE_IMAGES, SCORE_BATCH, seed=0):
            functional.cross_entropy(model(batch.images), batch.labels).backward()
        ratios, head_ratios = _ratios(model, space, counts)
        heads = {layer: module.num_heads for module, layer in peer._attentions(model)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it lists the parameters that belong to no layer
            pruner = tp.pruner.BasePruner(
                model,
                batch.images[:1],
                tp.importance.GroupTaylorImportance(),
                global_pruning=False,
                pruning_ratio=1 - keep,
                pruning_ratio_dict=ratios,
                head_pruning_ratio_dict=head_ratios,
                ignored_layers=_ignored(model, space),
                num_heads=heads,
                prune_num_heads=True,
                prune_head_dims=False,
                in_channel_groups={},
                out_channel_groups={},
            )
            pruner.step()
    peer.settle_heads(model, pruner)
    model.zero_grad(set_to_none=True)
    for module, training in modes:
        module.training = training


def _ratios(
    model: nn.Module, space: UnitSpace, counts: list[int]
) -> tuple[dict[nn.Module, float], dict[nn.Module, float]]:
    """The share to remove of each pruned layer's channels, and of the heads of each attention's layer.

    Half a unit to either side of the count, for torch-pruning rounds what is kept down and removed heads up.
    """
    widths, heads = {}, {}
    for group, count in zip(space.groups, counts, strict=True):
        for name, _ in group.tensors("produces"):
            layer = model.get_submodule(name.rpartition(".")[0])
            if group.kind == "head":
                heads[layer] = max(0.0, (group.size - count - 0.5) / group.size)
            widths[layer] = max(0.0, 1 - (count + 0.5) / group.size)
    return widths, heads


def _ignored(model: nn.Module, space: UnitSpace) -> list[nn.Module]:
    """The layers whose outputs Kinprune keeps whole: the residual stream, the classifier."""
    cut_layers = {
        name.rpartition(".")[0]
        for group in space.groups
        for role in ("produces", "carries")
        for name, _ in group.tensors(role)
    }
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and name not in cut_layers
    ]


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention in single operations, which torch-pruning can trace, and back to what it was."""
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _put(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model another's weights and buffers, its head apart; KeyError or RuntimeError where they do not fit."""
    own = model.state_dict()
    for name, tensor in state.items():
        own[name].copy_(tensor)


def _shared(what: str, learned: Pretrained) -> dict[str, Any]:
    return {"shared": what, "shared_seconds": learned.made["seconds"]}
