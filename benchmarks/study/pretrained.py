"""Weights that a baseline learns once from the bank's own source images: a meta-learned start.

It is a safetensors file in a folder beside the bank's file (see ``cache_folder``), with a JSON file beside it that
tells how it was made. What it was made of is also in the safetensors file's own metadata: where that is not what is
asked for (another bank, more records, other steps), it is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

import kinprune as kp
from kinprune.bank import Bank
from kinprune.bank.backbone import load_bank_backbone
from kinprune.calibration import frozen_batch_norm, head_inputs, is_folded, reestimate_batch_norm, solve_probe
from kinprune.errors import TaskError
from kinprune.evaluation import lay_out
from kinprune.preprocessing import Preprocessing, normalise
from kinprune.tasks import Split, decode, load_task
from kinprune.tasks.columns import LABEL_NAMES
from kinprune.training import Recipe
from kinprune.training.batches import batches, shift_and_flip
from kinprune.training.recipe import LEARNING_RATES, make_optimiser, optimiser_name, schedule

Tell = Callable[[str], None]

SHOTS = 100
"""Training images of each source class that are learned from."""
MOVE = 0.2
"""The share of the way to an episode's result that Reptile goes."""
INNER_STEPS = 10
"""Training steps of a Reptile episode."""


@dataclass(frozen=True)
class SourceImages:
    """Where a bank's source images are, as ``load_task`` takes it: ``classes`` are those of all its records."""

    data: str
    label_column: str | None
    classes: tuple[str, ...]
    shots: int


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model's ``state`` without its head, and ``made``: what of, how, and the seconds that it took."""

    state: Mapping[str, Tensor]
    made: Mapping[str, Any]


def cache_folder(bank: Bank) -> Path:
    """Where a bank's pretrained weights are kept: ``<its file>.study`` beside the SQLite file of the study's banks.

    Raises ValueError for a bank that is no SQLite file.
    """
    url = bank.engine.url
    if url.get_backend_name() != "sqlite" or not url.database:
        raise ValueError(f"the bank {url.render_as_string()} is no SQLite file, expected one: the study's banks are")
    path = Path(url.database)
    return path.with_name(f"{path.name}.study")


def sources_of(bank: Bank, shots: int = SHOTS) -> SourceImages:
    """The source images of all records of a bank that was built from one data set.

    Records tell the data set's path but not its label column: it is the one that ``load_task`` finds by itself, or
    the first of the customary names under which the records' classes can be loaded.

    Raises ValueError where records are of several data sets, or no label column has their classes.
    """
    entries = bank.entries()
    data = {str(entry.details.get("data")) for entry in entries}
    if len(data) != 1:
        raise ValueError(f"the bank's records are of the data sets {sorted(data)}, expected a single one")
    (path,) = data
    classes = tuple(sorted({name for entry in entries for name in entry.classes}))
    refusals = []
    for column in (None, *LABEL_NAMES):
        try:
            load_task(path, classes=classes, shots=1, label_column=column)
        except TaskError as error:
            refusals.append(error)
        else:
            return SourceImages(path, column, classes, shots)
    raise ValueError(f"the bank's source images cannot be loaded: {refusals[0]}") from refusals[0]


def reptile_weights(
    bank: Bank, sources: SourceImages, folder: Path, *, episodes: int, seed: int = 0, tell: Tell | None = None
) -> Pretrained:
    """The backbone's weights after Reptile (Nichol et al. 2018, arXiv 1803.02999) over the bank's source tasks.

    An episode draws a record, counts the batch norms again on the images of its classes, gives the model a closed-form
    head for them, trains it for ``INNER_STEPS`` batches and moves the meta weights, batch norm statistics among them,
    ``MOVE`` of the way to the result. Optimiser, highest rate and its course are those of a long fine-tuning
    (``Recipe``'s defaults); folded batch norms stay frozen, as there. Made once and kept in ``folder``.
    """
    asked = _asked(bank, sources, episodes=episodes, inner_steps=INNER_STEPS, move=MOVE, seed=seed)
    return _kept(folder / "reptile", asked, lambda: _reptile(bank, sources, episodes, seed, tell or _to_stderr))


def _reptile(
    bank: Bank, sources: SourceImages, episodes: int, seed: int, tell: Tell
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    entries = bank.entries()
    backbone = load_bank_backbone(bank, len(entries[0].classes))
    train, preprocessing = _decoded(sources, backbone)
    model, head = backbone.model, backbone.head
    lay_out(model)
    drawn = np.random.default_rng(seed).integers(len(entries), size=episodes).tolist()
    losses = []
    for episode, place in enumerate(drawn):
        classes = entries[place].classes
        split = _of_classes(train, [sources.classes.index(name) for name in classes])
        before = _without_head(model, head)
        reestimate_batch_norm(model, split.images, preprocessing, seed=seed)
        features = head_inputs(model, head, split.images, preprocessing)
        solve_probe(model, head, features, split.labels, len(classes))
        loss = _inner(model, split, preprocessing, seed=seed + episode)
        _move_back(model, before)
        losses.append(round(loss, 4))
        tell(f"reptile: episode {episode + 1} of {episodes}, loss {loss:.3f}")
    lay_out(model, fast=False)
    return _without_head(model, head), {"losses": losses}


def _inner(model: nn.Module, split: Split, preprocessing: Preprocessing, *, seed: int) -> float:
    """Train in place for an episode; the last batch's loss."""
    recipe = Recipe(seed=seed)
    name = optimiser_name(model, recipe)
    optimiser = make_optimiser(model, recipe, name, LEARNING_RATES[name])
    generator = torch.Generator().manual_seed(seed)
    order = batches(len(split), min(recipe.batch_size, len(split)), generator)
    value = 0.0
    model.train()
    with torch.random.fork_rng(devices=[]), frozen_batch_norm(model, is_folded):
        torch.default_generator.manual_seed(seed)
        for step in range(1, INNER_STEPS + 1):
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATES[name] * schedule(step, INNER_STEPS, recipe.warmup)
            chosen = next(order)
            images = shift_and_flip(split.images[chosen], generator, flip=recipe.flip)
            loss = functional.cross_entropy(model(normalise(images, preprocessing)), split.labels[chosen])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimiser.step()
            value = float(loss.detach())
    model.eval()
    return value


@torch.no_grad()
def _move_back(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Leave the model ``MOVE`` of the way from ``before`` to where it is; counts of batches stay as they are."""
    for name, tensor in model.state_dict().items():
        if name in before and tensor.is_floating_point():
            tensor.copy_(torch.lerp(before[name], tensor, MOVE))


def _decoded(sources: SourceImages, backbone: kp.Backbone) -> tuple[Split, Preprocessing]:
    """The training images of all source classes, labelled by their place in ``sources.classes``."""
    task = load_task(sources.data, classes=sources.classes, shots=sources.shots, label_column=sources.label_column)
    return decode(task, backbone.preprocessing).train, backbone.preprocessing


def _of_classes(split: Split, labels: list[int]) -> Split:
    """The images of some labels, relabelled by their place among them."""
    place = torch.full((int(split.labels.max()) + 1,), -1)
    place[labels] = torch.arange(len(labels))
    relabelled = place[split.labels]
    return Split(split.images[relabelled >= 0], relabelled[relabelled >= 0])


def _without_head(model: nn.Module, head: str) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone() for name, tensor in model.state_dict().items() if not name.startswith(f"{head}.")
    }


def _asked(bank: Bank, sources: SourceImages, **settings: Any) -> dict[str, Any]:
    """All that decides what the weights come to, as JSON's own types."""
    keys = hashlib.sha256("\n".join(sorted(bank.keys())).encode()).hexdigest()
    asked = {
        "backbone": bank.header.backbone,
        "space": bank.header.space,
        "records": keys,
        "sources": asdict(sources),
        **settings,
    }
    return dict(json.loads(json.dumps(asked)))


def _kept(
    path: Path, asked: dict[str, Any], make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
) -> Pretrained:
    """The weights kept at ``path`` where they were made of what is asked for; else they are made, and kept."""
    weights, notes = path.with_name(f"{path.name}.safetensors"), path.with_name(f"{path.name}.json")
    if weights.exists():
        with safe_open(weights, "pt") as file:
            made = json.loads((file.metadata() or {}).get("made", "{}"))
        if made.get("asked") == asked:
            return Pretrained(load_file(weights), made)
    started = time.perf_counter()
    state, found = make()
    made = {"asked": asked, "seconds": round(time.perf_counter() - started, 1), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.contiguous() for name, tensor in state.items()}, {"made": json.dumps(made)})
    for target, data in ((weights, content), (notes, json.dumps(made, indent=1).encode())):
        _write(target, data)
    return Pretrained(state, made)


def _write(path: Path, data: bytes) -> None:
    """All of the file or nothing, whoever else writes it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_bytes(data)
    os.replace(part, path)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
