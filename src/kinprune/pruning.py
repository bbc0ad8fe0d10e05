"""Pruning one task from scratch: score, remove, repair and fine-tune, once or in rounds.

The model really shrinks at every round, so that later rounds are cheaper. What is learned on the way is a ranking of
all units: the survivors by their importance in the finished model, then the removed ones, last removed first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kinprune.backbones import Backbone
from kinprune.calibration import ClosedForm, Probe, answers_of, head_inputs, solve_probe
from kinprune.calibration.head import HeadMethod
from kinprune.errors import BackboneError, BudgetError
from kinprune.evaluation import Evaluation, evaluate, lay_out
from kinprune.importance import CRITERIA, Criterion, Normalisation, Scores, draw_batches, normalise, rank, score
from kinprune.preprocessing import Preprocessing
from kinprune.repair import repair
from kinprune.selection import Allocation, Budget, CostFunctions, Selection, select
from kinprune.tasks import DecodedTask, Split
from kinprune.training import Recipe, TrainingResult, fine_tune, hold_back
from kinprune.units import Costs, Mask, UnitSpace, extract, find_units

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """How to prune.

    ``rounds`` 1 is one-shot; more remove a share each, geometrically, with ``round_steps`` steps of fine-tuning in
    between. ``score_images`` are read to score units, ``score_batch`` at a time. ``reconstruct`` lets the layers
    behind removed units be solved again, ``distil`` the whole model teach the small one, by what it answers to each
    training image as it is. ``recipe`` is the last fine-tuning, and its seed the seed of everything.
    """

    budget: Budget
    criterion: Criterion = "taylor"
    rounds: int = 1
    round_steps: int = 25
    allocation: Allocation = "layer"
    normalisation: Normalisation = "mean"
    multiple: int = 1
    stream: bool = False
    reconstruct: bool = True
    distil: bool = True
    head: HeadMethod = "ridge"
    score_images: int = 256
    score_batch: int = 64
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("rounds", self.rounds, 1),
            ("round_steps", self.round_steps, 0),
            ("multiple", self.multiple, 1),
            ("score_images", self.score_images, 1),
            ("score_batch", self.score_batch, 1),
        ):
            if value < least:
                raise BudgetError(f"{name} is {value}, expected a whole number of at least {least}")
        for name, word, known in (
            ("method", self.criterion, CRITERIA),
            ("allocation", self.allocation, get_args(Allocation)),
            ("normalisation", self.normalisation, get_args(Normalisation)),
            ("head", self.head, get_args(HeadMethod)),
        ):
            if word not in known:
                raise BudgetError(f"there is no {name} '{word}', expected one of: {', '.join(known)}")


@dataclass(frozen=True, eq=False)
class Pruned:
    """What pruning gave: the small model, its mask on the whole unit space, and what was measured on the way.

    ``ranking`` is ``int64 [u]``, each unit's place in its group, 0 the best; ``scores`` ``float64 [u]`` are each
    unit's last normalised importance. ``probe`` is the whole model's closed-form head, and ``dense`` the whole model
    with it; ``start`` is the small one in closed form before any step, ``final`` after the steps, all on the test
    images. ``seconds`` is by stage.
    """

    model: nn.Module
    plan: Plan
    space: UnitSpace
    selection: Selection
    ranking: NDArray[np.int64]
    scores: Scores
    probe: Probe
    closed_form: ClosedForm
    training: TrainingResult
    whole: Costs
    dense: Evaluation
    start: Evaluation
    final: Evaluation
    seconds: dict[str, float]


def prune(
    backbone: Backbone,
    task: DecodedTask,
    plan: Plan,
    *,
    device: str = "cpu",
    on_step: OnStep | None = None,
    train_memory: int | None = None,
    costs: CostFunctions | None = None,
) -> Pruned:
    """Prune a backbone for one task under a plan; the backbone itself is not changed.

    The backbone must have been made for the task's number of classes. ``on_step(stage, step, steps)`` is called when
    a stage begins, with step 0, and after every training step; ``steps`` is 0 where a stage has none. Bad budgets are
    refused before anything is trained. Ctrl-C during the last fine-tuning keeps the best state so far
    (``training.stopped``); earlier it ends the pruning. ``train_memory`` is the ``memory_limit`` of every fine-tuning,
    see ``fine_tune``. ``costs`` are what the budget's limits count in: the unit space's own where none are given, a
    device's (``devices.goal.DeviceCosts``) in its precision, and in milliseconds where it was profiled.

    Raises:
        BackboneError: the backbone answers another number of classes.
        UnitError, BudgetError, ImportanceError, TrainingError: see the functions called.
    """
    if backbone.spec.num_classes != len(task.classes):
        raise BackboneError(
            f"the backbone answers {backbone.spec.num_classes} classes, the task {task.name} has {len(task.classes)}: "
            f"load it with num_classes={len(task.classes)}"
        )
    seconds: dict[str, float] = {}
    with _stage(seconds, "units"):
        space = unit_space(backbone, plan, image_size=task.preprocessing.image_size, costs=costs)
    shrinking = _Shrinking.begin(backbone, task, plan, space, device, on_step)
    shrinking.train_memory = train_memory
    shrinking.costs = space.costs if costs is None else costs
    with _stage(seconds, "dense"):
        shrinking.tell("whole model")
        probe = shrinking.solve_dense_head()
        dense = evaluate(shrinking.model, task.test, task.preprocessing, device=device)
    with _stage(seconds, "prune"):
        for number in range(plan.rounds):
            shrinking.cut(number)
    with _stage(seconds, "evaluate"):
        shrinking.tell("evaluation")
        start = evaluate(shrinking.model, task.test, task.preprocessing, device=device)
    with _stage(seconds, "fine-tune"):
        training = shrinking.train(plan.recipe, "fine-tuning", interruptible=True)
    with _stage(seconds, "evaluate"):
        shrinking.tell("evaluation")
        final = evaluate(shrinking.model, task.test, task.preprocessing, device=device)
    with _stage(seconds, "rank"):
        ranking = shrinking.ranking()
    assert shrinking.selection is not None and shrinking.repair is not None
    return Pruned(
        shrinking.model,
        plan,
        space,
        shrinking.selection,
        ranking,
        shrinking.scores,
        probe,
        shrinking.repair,
        training,
        space.cost(space.whole_mask()),
        dense,
        start,
        final,
        seconds,
    )


def unit_space(
    backbone: Backbone, plan: Plan, *, image_size: tuple[int, int] | None = None, costs: CostFunctions | None = None
) -> UnitSpace:
    """The units that a plan chooses among; asks for no data, so that bad budgets are refused before any are decoded.

    ``image_size`` (height, width) is the backbone's own where none is given.

    Raises:
        UnitError: nothing can be pruned.
        BudgetError: the budget cannot be reached; whether it can does not depend on scores.
    """
    size = backbone.preprocessing.image_size if image_size is None else image_size
    space = find_units(backbone.model, size, stream=plan.stream, head=backbone.head)
    select(space, np.zeros(len(space)), plan.budget, multiple=plan.multiple, costs=costs)
    return space


@contextmanager
def _stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + perf_counter() - started


@dataclass(eq=False)
class _Shrinking:
    """A model on its way from whole to small."""

    plan: Plan
    head: str
    classes: int
    preprocessing: Preprocessing
    device: str
    on_step: OnStep | None
    fit: Split
    guard: Split | None
    space: UnitSpace
    model: nn.Module
    mask: Mask
    removed_in: NDArray[np.int64]
    scores: Scores
    selection: Selection | None = None
    repair: ClosedForm | None = None
    train_memory: int | None = None
    costs: CostFunctions | None = None
    answers: Tensor | None = None

    @classmethod
    def begin(
        cls, backbone: Backbone, task: DecodedTask, plan: Plan, space: UnitSpace, device: str, on_step: OnStep | None
    ) -> _Shrinking:
        fit, guard = hold_back(task.train, plan.recipe.hold_back, plan.recipe.seed)
        model = copy.deepcopy(backbone.model).to(device)
        lay_out(model)
        return cls(
            plan,
            backbone.spec.head,
            len(task.classes),
            task.preprocessing,
            device,
            on_step,
            fit,
            guard,
            space,
            model,
            space.whole_mask(),
            np.full(len(space), plan.rounds, dtype=np.int64),
            np.zeros(len(space)),
        )

    def tell(self, stage: str, step: int = 0, steps: int = 0) -> None:
        if self.on_step is not None:
            self.on_step(stage, step, steps)

    def solve_dense_head(self) -> Probe:
        features = head_inputs(self.model, self.head, self.fit.images, self.preprocessing)
        probe = solve_probe(self.model, self.head, features, self.fit.labels, self.classes, method=self.plan.head)
        if self.plan.distil:
            self.answers = answers_of(probe, features)
        return probe

    def cut(self, number: int) -> None:
        """One round: score what is left, remove down to this round's budget, repair, and train if more follow."""
        whole = self.model
        self.tell("scoring")
        self._score()
        last = number == self.plan.rounds - 1
        selection = select(
            self.space,
            self.scores,
            self._budget(number),
            allocation=self.plan.allocation,
            normalisation="none",
            multiple=self.plan.multiple,
            within=self.mask,
            costs=self.costs,
        )
        current = self.space.shrink(self.mask)
        step = Mask(selection.mask.kept[self.mask.kept], current.fingerprint)
        self.model = extract(whole, current, step)
        lay_out(self.model)
        self.removed_in[self.mask.kept & ~selection.mask.kept] = number
        self.mask, self.selection = selection.mask, selection
        self.tell("closed form")
        self.repair = repair(
            self.model,
            whole,
            current,
            step,
            self.fit,
            self.preprocessing,
            head=self.head,
            reconstruct=self.plan.reconstruct,
            method=self.plan.head,
            seed=self.plan.recipe.seed,
        )
        if not last:
            recipe = replace(self.plan.recipe, steps=self.plan.round_steps, seed=self.plan.recipe.seed + number + 1)
            self.train(recipe, f"round {number + 1}", interruptible=False)

    def _budget(self, number: int) -> Budget:
        """The round's budget: shares of the whole that shrink by the same factor every round."""
        share = (number + 1) / self.plan.rounds
        budget = self.plan.budget
        if share == 1:
            return budget
        limits: dict[str, Any] = {}
        for name, limit in budget.limits().items():
            whole = float(getattr(self.costs, name)(self.space.sizes[None])[0])
            amount = whole * min(limit / whole, 1) ** share
            limits[name] = amount if name == "latency_ms" else round(amount)
        return Budget(keep=None if budget.keep is None else budget.keep**share, **limits)

    def _score(self) -> None:
        """Score the units still there, in the model as it is now; the others keep the score they left with."""
        current = self.space.shrink(self.mask)
        plan, seed = self.plan, self.plan.recipe.seed
        batches = draw_batches(
            self.fit, self.preprocessing, plan.score_images, plan.score_batch, seed=seed, device=self.device
        )
        values = score(plan.criterion, self.model, current, batches, seed=seed)
        self.scores[self.mask.kept] = normalise(current, values, self.plan.normalisation)

    def train(self, recipe: Recipe, stage: str, *, interruptible: bool) -> TrainingResult:
        self.tell(stage, 0, recipe.steps)
        result = fine_tune(
            self.model,
            self.fit,
            self.preprocessing,
            recipe,
            device=self.device,
            held_back=self.guard,
            answers=self.answers,
            begin=None if self.repair is None else self.repair.trainable,
            memory_limit=self.train_memory,
            on_step=lambda step, steps, _loss: self.tell(stage, step, steps),
        )
        if result.stopped and not interruptible:
            raise KeyboardInterrupt
        return result

    def ranking(self) -> NDArray[np.int64]:
        """Every unit's place: survivors by importance in the finished model, then the removed, last removed first.

        In one shot all units were scored at once, in the whole model: survivors are not scored again.
        """
        if self.plan.rounds > 1:
            self._score()
        return rank(self.space, self.removed_in.astype(np.float64), (self.scores,))
