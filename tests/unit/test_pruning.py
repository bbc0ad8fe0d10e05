"""Pruning one task: exact counts, rankings, refusals, repeatability, interruptions."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinprune import pruning
from kinprune.backbones import Backbone, load_backbone
from kinprune.errors import BackboneError, BudgetError, TrainingError
from kinprune.evaluation import logits
from kinprune.importance import CRITERIA
from kinprune.pruning import Plan, Pruned, prune, unit_space
from kinprune.selection import Budget, select
from kinprune.tasks import DecodedTask, Split, decode, task_from_arrays
from kinprune.training import Recipe, fine_tune, hold_back

CLASSES = ("apple", "pear", "plum")
PER_CLASS = 12
KEEP = 0.2


def load(name: str, classes: int = len(CLASSES)) -> Backbone:
    """A newly initialised backbone whose batch norms differ, as in a trained one."""
    backbone = load_backbone(name, num_classes=classes, random=True, image_size=32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in backbone.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
    return backbone


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    return load("test_resnet")


@pytest.fixture(scope="module")
def task(resnet: Backbone, make_pixels: Callable[..., NDArray[np.uint8]]) -> DecodedTask:
    images = np.stack([make_pixels(name, number, 32) for name in CLASSES for number in range(PER_CLASS)])
    labels = np.repeat(np.arange(len(CLASSES)), PER_CLASS)
    return decode(task_from_arrays(images, labels, CLASSES, test_fraction=0.5, name="fruit"), resnet.preprocessing)


def plan(budget: Budget | None = None, steps: int = 4, **values: Any) -> Plan:
    recipe = Recipe(steps=steps, batch_size=8, hold_back=0.2)
    return Plan(budget or Budget(keep=KEEP), recipe=recipe, **values)


@pytest.fixture(scope="module")
def once(resnet: Backbone, task: DecodedTask) -> Pruned:
    return prune(resnet, task, plan())


@pytest.fixture(scope="module")
def in_rounds(resnet: Backbone, task: DecodedTask) -> Pruned:
    return prune(resnet, task, plan(rounds=3, round_steps=3))


@pytest.fixture(params=["once", "in_rounds"])
def pruned(request: pytest.FixtureRequest) -> Pruned:
    found: Pruned = request.getfixturevalue(request.param)
    return found


def share_of(ranking: NDArray[np.int64], pruned: Pruned, keep: float) -> NDArray[np.bool_]:
    """The units that a ranking keeps at a share of each group's."""
    space = pruned.space
    counts = np.maximum(np.floor(space.sizes * keep + 1e-9), 1)
    kept: NDArray[np.bool_] = ranking < counts[space.group_of]
    return kept


def test_counts_and_costs_are_exact(pruned: Pruned) -> None:
    space, selection = pruned.space, pruned.selection
    expected = np.maximum(np.floor(space.sizes * KEEP), 1)
    assert space.counts(selection.mask.kept).tolist() == expected.tolist()
    assert sum(parameter.numel() for parameter in pruned.model.parameters()) == selection.costs.parameters
    assert selection.costs.units == selection.mask.kept.sum() == expected.sum()
    assert pruned.whole.parameters > 2 * selection.costs.parameters


def test_a_ranking_is_a_permutation_of_each_group_with_the_survivors_first(pruned: Pruned) -> None:
    space = pruned.space
    for places, kept in zip(space.split(pruned.ranking), space.split(pruned.selection.mask.kept), strict=True):
        assert sorted(places.tolist()) == list(range(len(places)))
        assert set(places[kept].tolist()) == set(range(int(kept.sum())))


def test_a_ranking_holds_a_mask_for_every_share_and_they_nest(pruned: Pruned) -> None:
    inner = np.zeros(len(pruned.space), dtype=bool)
    for keep in np.linspace(0.02, 1, 25):
        outer = share_of(pruned.ranking, pruned, keep)
        chosen = select(pruned.space, -pruned.ranking.astype(float), Budget(keep=keep)).mask.kept
        assert np.array_equal(chosen, outer)
        assert np.all(inner <= outer)
        inner = outer
    assert inner.all()
    assert np.array_equal(share_of(pruned.ranking, pruned, KEEP), pruned.selection.mask.kept)


def test_last_removed_ranks_before_earlier_removed(
    resnet: Backbone, task: DecodedTask, in_rounds: Pruned, once: Pruned
) -> None:
    """The first of three rounds leaves what one shot to its share leaves: that ranks before what it removed."""
    first = prune(resnet, task, plan(Budget(keep=KEEP ** (1 / 3)), steps=0))
    assert np.array_equal(share_of(in_rounds.ranking, in_rounds, KEEP ** (1 / 3)), first.selection.mask.kept)
    assert np.all(in_rounds.selection.mask.kept <= first.selection.mask.kept)
    assert not np.array_equal(in_rounds.selection.mask.kept, once.selection.mask.kept)


def test_removed_units_keep_their_last_scores(once: Pruned, in_rounds: Pruned) -> None:
    """Where units were removed together, the ranking follows their scores."""
    for pruned, share in ((once, 0.0), (in_rounds, KEEP ** (1 / 3))):
        space = pruned.space
        places = space.split(pruned.ranking)
        for place, scores in zip(places, space.split(pruned.scores), strict=True):
            removed = np.argsort(place)[max(int(np.floor(len(place) * share + 1e-9)), share > 0) :]
            assert np.all(np.diff(scores[removed]) <= 0)


def test_the_pruned_model_has_learned_the_task(pruned: Pruned) -> None:
    assert pruned.dense.n == pruned.final.n == len(CLASSES) * PER_CLASS / 2
    assert pruned.final.accuracy > 0.6
    assert len(pruned.training.losses) == 4 and not pruned.training.stopped
    assert set(pruned.seconds) == {"units", "dense", "prune", "evaluate", "fine-tune", "rank"}


def test_the_same_seed_gives_the_same_and_the_global_state_is_left(
    resnet: Backbone, task: DecodedTask, in_rounds: Pruned
) -> None:
    state = torch.random.get_rng_state()
    again = prune(resnet, task, in_rounds.plan)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(again.ranking, in_rounds.ranking) and np.array_equal(again.scores, in_rounds.scores)
    assert again.selection.mask == in_rounds.selection.mask
    assert again.training.losses == in_rounds.training.losses
    tensors = in_rounds.model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.model.state_dict().items())


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_whole_model_teaches_by_what_it_answered_once(
    resnet: Backbone, task: DecodedTask, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    told: list[Tensor | None] = []

    def note(model: nn.Module, split: Split, *args: Any, **options: Any) -> Any:
        assert "teacher" not in options
        told.append(options["answers"])
        return fine_tune(model, split, *args, **options)

    monkeypatch.setattr(pruning, "fine_tune", note)
    taught = prune(resnet, task, plan(rounds=rounds, round_steps=2))
    alone = prune(resnet, task, plan(rounds=rounds, round_steps=2, distil=False))
    assert told[rounds:] == [None] * rounds and taught.training.losses != alone.training.losses
    dense = copy.deepcopy(resnet.model)
    fit, _ = hold_back(task.train, taught.plan.recipe.hold_back, taught.plan.recipe.seed)
    layer = dense.get_submodule(resnet.head)
    assert isinstance(layer, nn.Linear)
    layer.weight.data, layer.bias.data = (
        torch.from_numpy(part) for part in (taught.probe.weights, taught.probe.biases)
    )
    expected = logits(dense, fit.images, task.preprocessing)
    assert all(one is not None and torch.allclose(one, expected, atol=1e-4) for one in told[:rounds])


def test_another_seed_gives_another_model(resnet: Backbone, task: DecodedTask, once: Pruned) -> None:
    other = prune(resnet, task, dataclasses.replace(once.plan, recipe=dataclasses.replace(once.plan.recipe, seed=7)))
    assert other.training.losses != once.training.losses


def test_the_backbone_is_not_changed(task: DecodedTask) -> None:
    backbone = load("test_resnet")
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    prune(backbone, task, plan(rounds=2, round_steps=1))
    after = backbone.model.state_dict()
    assert before.keys() == after.keys() and not backbone.model.training
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_prunes(resnet: Backbone, task: DecodedTask, criterion: Any) -> None:
    found = prune(resnet, task, plan(criterion=criterion, steps=0, rounds=2, round_steps=1))
    assert found.selection.costs.units == np.maximum(np.floor(found.space.sizes * KEEP), 1).sum()
    assert found.final.accuracy == found.start.accuracy
    assert np.isfinite(found.scores).all() and np.ptp(found.scores) > 0


def test_reconstruction_is_tried_unless_it_is_switched_off(resnet: Backbone, task: DecodedTask, once: Pruned) -> None:
    assert {layer.name for layer in once.closed_form.layers} >= {"layer1.0.conv2"}
    without = prune(resnet, task, plan(reconstruct=False))
    assert without.closed_form.layers == () and not without.closed_form.reconstructed
    assert without.selection.mask == once.selection.mask


@pytest.mark.parametrize("rounds", [1, 3])
def test_limits_hold_in_one_shot_and_in_rounds(resnet: Backbone, task: DecodedTask, rounds: int) -> None:
    whole = unit_space(resnet, plan()).costs.of(unit_space(resnet, plan()).sizes)
    budget = Budget(parameters=whole.parameters * 2 // 5, macs=whole.macs // 2, keep=0.9)
    found = prune(resnet, task, plan(budget, steps=0, rounds=rounds, round_steps=1, allocation="global"))
    costs = found.selection.costs
    assert costs.parameters <= whole.parameters * 2 // 5 and costs.macs <= whole.macs // 2
    assert max(costs.parameters / (whole.parameters * 0.4), costs.macs / (whole.macs * 0.5)) > 0.99
    assert sum(parameter.numel() for parameter in found.model.parameters()) == costs.parameters


def test_rounds_come_to_a_limit_by_equal_factors(resnet: Backbone, task: DecodedTask) -> None:
    """The first of two rounds to a quarter of the MACs leaves what one shot to half of them leaves."""
    space = unit_space(resnet, plan())
    whole = space.cost(space.whole_mask()).macs
    found = prune(resnet, task, plan(Budget(macs=round(whole / 4)), steps=0, rounds=2, round_steps=0))
    first = prune(resnet, task, plan(Budget(macs=round(whole / 2)), steps=0)).selection.mask.kept
    assert np.array_equal(found.ranking < space.counts(first)[space.group_of], first)
    at_once = prune(resnet, task, plan(Budget(macs=round(whole / 4)), steps=0)).selection.mask
    assert found.selection.mask != at_once


def test_stream_and_multiples_in_rounds(resnet: Backbone, task: DecodedTask) -> None:
    found = prune(resnet, task, plan(Budget(keep=0.5), steps=0, rounds=2, round_steps=1, stream=True, multiple=8))
    assert {group.kind for group in found.space.groups} == {"filter", "channel"}
    assert not np.any(found.space.counts(found.selection.mask.kept) % 8)
    with torch.no_grad():
        assert found.model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_a_transformer_loses_heads_and_nodes(make_pixels: Callable[..., NDArray[np.uint8]]) -> None:
    vit = load("test_vit")
    images = np.stack([make_pixels(name, number, 32) for name in CLASSES for number in range(2)])
    arrays = task_from_arrays(images, np.repeat(np.arange(3), 2), CLASSES, test_fraction=0.5)
    # One training image a class: none can be held back.
    found = prune(vit, decode(arrays, vit.preprocessing), plan(Budget(keep=0.5), steps=2))
    assert found.selection.costs.units * 2 == found.whole.units
    assert {group.kind for group in found.space.groups} == {"head", "node"}
    assert found.training.guard == "training"


def never(stage: str, step: int, steps: int) -> None:
    raise AssertionError(f"{stage} was begun")


@pytest.mark.parametrize("name", ["parameters", "macs", "weight_bytes", "peak_memory_bytes"])
def test_an_impossible_budget_is_refused_before_any_step(resnet: Backbone, task: DecodedTask, name: str) -> None:
    impossible = plan(Budget(**{name: 1000}), rounds=2)
    with pytest.raises(BudgetError, match=r"the budget of 1,000 .* still needs"):
        prune(resnet, task, impossible, on_step=never)
    with pytest.raises(BudgetError, match=r"the budget of 1,000 .* still needs"):
        unit_space(resnet, impossible)


def test_the_units_of_a_plan(resnet: Backbone) -> None:
    plain, stream = unit_space(resnet, plan()), unit_space(resnet, plan(stream=True))
    assert len(stream) > len(plain) and plain.fingerprint != stream.fingerprint
    small, large = unit_space(resnet, plan(), image_size=(48, 32)), unit_space(resnet, plan())
    assert small.cost(small.whole_mask()).macs > large.cost(large.whole_mask()).macs


def test_a_backbone_of_other_classes_is_refused(task: DecodedTask) -> None:
    with pytest.raises(BackboneError, match=r"answers 5 classes, the task fruit has 3: load it with num_classes=3"):
        prune(load("test_resnet", classes=5), task, plan(), on_step=never)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"criterion": "magic"}, "no method 'magic', expected one of: random, l1"),
        ({"allocation": "even"}, "no allocation 'even', expected one of: layer, global"),
        ({"normalisation": "sum"}, "no normalisation 'sum', expected one of: none, mean"),
        ({"head": "svm"}, "no head 'svm', expected one of: ridge, class-mean"),
        ({"rounds": 0}, "rounds is 0, expected a whole number of at least 1"),
        ({"round_steps": -1}, "round_steps is -1"),
        ({"multiple": 0}, "multiple is 0"),
        ({"score_images": 0}, "score_images is 0"),
        ({"score_batch": 0}, "score_batch is 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        plan(**values)


def test_ctrl_c_in_a_round_ends_the_pruning(resnet: Backbone, task: DecodedTask) -> None:
    seen: list[tuple[str, int, int]] = []

    def interrupt(stage: str, step: int, steps: int) -> None:
        seen.append((stage, step, steps))
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(resnet, task, plan(rounds=2, round_steps=5), on_step=interrupt)
    assert seen == [
        ("whole model", 0, 0),
        ("scoring", 0, 0),
        ("closed form", 0, 0),
        ("round 1", 0, 5),
        ("round 1", 1, 5),
        ("round 1", 2, 5),
    ]


def test_ctrl_c_in_the_last_fine_tuning_keeps_the_best(resnet: Backbone, task: DecodedTask, once: Pruned) -> None:
    steps_of: Counter[str] = Counter()

    def interrupt(stage: str, step: int, steps: int) -> None:
        steps_of[stage] += step > 0
        if stage == "fine-tuning" and step == 3:
            raise KeyboardInterrupt

    found = prune(resnet, task, plan(rounds=2, round_steps=1, steps=50), on_step=interrupt)
    assert +steps_of == {"round 1": 1, "fine-tuning": 3}
    assert [*steps_of][-3:] == ["round 1", "evaluation", "fine-tuning"]
    assert found.training.stopped and len(found.training.losses) == 3
    assert found.training.best_step == 0 and found.final.accuracy == found.start.accuracy
    assert sorted(found.ranking.tolist()) == sorted(once.ranking.tolist())


def test_a_loss_that_is_not_finite_is_an_error(resnet: Backbone, task: DecodedTask) -> None:
    recipe = Recipe(steps=6, batch_size=8, learning_rate=1e30, clip_norm=None)
    with pytest.raises(TrainingError, match="the loss became"):
        prune(resnet, task, Plan(Budget(keep=0.5), recipe=recipe))
