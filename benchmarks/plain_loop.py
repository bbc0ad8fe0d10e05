"""A source task pruned as it is written with torch-pruning alone: the plain loop that a build is measured against.

The model as timm builds it, in float32 and PyTorch's own memory format; a new head, fitted to the whole model's
features; rounds of Taylor importance, removal and fine-tuning; last steps; accuracy. Everything that has a choice is
what ``kinprune.Plan`` and ``kinprune.Recipe`` say: rounds, steps, batch size, optimiser, learning rate, images.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import kinprune as kp
from benchmarks import peer
from benchmarks.study.baselines import _ignored, _ratios
from kinprune.preprocessing import Preprocessing, normalise
from kinprune.tasks import DecodedTask, Split
from kinprune.training.batches import batches, shift_and_flip
from kinprune.training.recipe import default_rate, make_optimiser, optimiser_name, schedule
from kinprune.units import UnitSpace

HEAD_STEPS, HEAD_RATE = 100, 0.01
"""How the new head is fitted to features that are there already: AdamW on all images at once."""

Clock = Callable[[str], AbstractContextManager[None]]


@dataclass(eq=False)
class PlainLoop:
    """One source task, pruned by torch-pruning in the rounds of ``plan``.

    ``counts`` has the units that Kinprune keeps of each of the groups of ``space``: torch-pruning cuts the same layers
    to the same widths. With ``taught`` the whole model teaches the small one, as it does in Kinprune.
    """

    backbone: kp.Backbone
    task: DecodedTask
    plan: kp.Plan
    space: UnitSpace
    counts: list[int]
    taught: bool
    device: str
    clock: Clock
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def preprocessing(self) -> Preprocessing:
        return self.task.preprocessing

    def run(self) -> tuple[nn.Module, float]:
        """The small model, and its accuracy on the test images."""
        with self.clock("model and head"):
            model = copy.deepcopy(self.backbone.model).to(self.device)
            for module in model.modules():
                if getattr(module, "fused_attn", False):
                    setattr(module, "fused_attn", False)  # noqa: B010 - torch-pruning traces single operations
            self.fit_head(model)
        teacher = copy.deepcopy(model).eval() if self.taught else None
        with self.clock("prune"):
            pruner = self.pruner(model)
        for number in range(1, self.plan.rounds + 1):
            with self.clock("prune"):
                self.score(model)
                pruner.step()
                peer.settle_heads(model, pruner)
                model.zero_grad(set_to_none=True)
            last = number == self.plan.rounds
            with self.clock("last steps" if last else "rounds' steps"):
                self.train(model, teacher, self.plan.recipe.steps if last else self.plan.round_steps)
        with self.clock("evaluate"):
            return model, self.accuracy(model, self.task.test)

    def inputs(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.device), self.preprocessing)

    def fit_head(self, model: Any) -> None:
        """Logistic regression on the features of all training images, which are computed once."""
        model.eval()
        head: Any = model.get_submodule(self.backbone.head)
        with torch.no_grad():
            parts = torch.split(self.task.train.images, 128)
            features = torch.cat(
                [model.forward_head(model.forward_features(self.inputs(part)), pre_logits=True) for part in parts]
            )
        labels = self.task.train.labels.to(self.device)
        optimiser = torch.optim.AdamW(head.parameters(), HEAD_RATE)
        for _ in range(HEAD_STEPS):
            optimiser.zero_grad()
            functional.cross_entropy(head(features), labels).backward()
            optimiser.step()

    def pruner(self, model: nn.Module) -> Any:
        """torch-pruning's own iterative pruner, its shares of the last round such that the counts are Kinprune's."""
        import torch_pruning as tp

        widths, heads = _ratios(model, self.space, self.counts)

        def geometric(ratio: float, steps: int) -> list[float]:
            return [1 - (1 - ratio) ** (step / steps) for step in range(steps + 1)]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it lists the parameters that belong to no layer
            return tp.pruner.BasePruner(
                model.eval(),
                self.inputs(self.task.train.images[:1]),
                tp.importance.GroupTaylorImportance(),
                global_pruning=False,
                pruning_ratio=1 - (self.plan.budget.keep or 1.0),
                pruning_ratio_dict=widths,
                head_pruning_ratio_dict=heads,
                iterative_steps=self.plan.rounds,
                iterative_pruning_ratio_scheduler=geometric,
                ignored_layers=_ignored(model, self.space),
                num_heads={layer: module.num_heads for module, layer in peer._attentions(model)},
                prune_num_heads=True,
                prune_head_dims=False,
                in_channel_groups={},
                out_channel_groups={},
            )

    def score(self, model: nn.Module) -> None:
        """Gradients of the loss over the scoring images, in evaluation mode."""
        model.eval()
        order = torch.randperm(len(self.task.train), generator=self.generator)[: self.plan.score_images]
        for chosen in torch.split(order, self.plan.score_batch):
            labels = self.task.train.labels[chosen].to(self.device)
            functional.cross_entropy(model(self.inputs(self.task.train.images[chosen])), labels).backward()

    def train(self, model: nn.Module, teacher: nn.Module | None, steps: int) -> None:
        recipe = self.plan.recipe
        name = optimiser_name(model, recipe)
        rate = recipe.learning_rate or default_rate(name, steps)
        optimiser = make_optimiser(model, recipe, name, rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda done: schedule(min(done + 1, steps), steps, recipe.warmup)
        )
        model.train()
        for images, labels in self.mini_batches(steps):
            loss = self.loss(model(images), labels, None if teacher is None else answers(teacher, images))
            optimiser.zero_grad()
            loss.backward()
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimiser.step()
            scheduler.step()

    def mini_batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        recipe, train = self.plan.recipe, self.task.train
        order = batches(len(train), min(recipe.batch_size, len(train)), self.generator)
        for _ in range(steps):
            chosen = next(order)
            images = train.images[chosen]
            if recipe.augmentation == "light":
                images = shift_and_flip(images, self.generator, flip=recipe.flip)
            yield self.inputs(images), train.labels[chosen].to(self.device)

    def loss(self, outputs: Tensor, labels: Tensor, wanted: Tensor | None) -> Tensor:
        loss = functional.cross_entropy(outputs, labels)
        if wanted is None:
            return loss
        recipe = self.plan.recipe
        heat, share = recipe.distillation_temperature, recipe.distillation
        divergence = functional.kl_div(
            (outputs / heat).log_softmax(1), (wanted / heat).log_softmax(1), reduction="batchmean", log_target=True
        )
        return (1 - share) * loss + share * heat**2 * divergence

    @torch.no_grad()
    def accuracy(self, model: nn.Module, split: Split) -> float:
        model.eval()
        parts = zip(torch.split(split.images, 128), torch.split(split.labels, 128), strict=True)
        right = sum(int((model(self.inputs(images)).argmax(1).cpu() == labels).sum()) for images, labels in parts)
        return right / len(split)


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    found: Tensor = model(images)
    return found
