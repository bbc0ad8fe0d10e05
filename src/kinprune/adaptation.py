"""Adapting: from a new task and a bank to pruned, fine-tuned models. The one place that knows the whole way."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from torch import Tensor, nn

from kinprune.adapt_plan import AdaptPlan, Inheritance
from kinprune.admission import check_goals, check_task, check_training_memory
from kinprune.backbones import Backbone
from kinprune.bank import Bank, Lessons, check_space, open_bank
from kinprune.bank.backbone import bank_space, load_bank_backbone
from kinprune.calibration import ClosedForm, Probe, answers_of, can_judge, head_inputs, solve_probe
from kinprune.devices.goal import Goal
from kinprune.devices.settling import settle, time_model, timed_here
from kinprune.election import Electorate, Trial, elect, pick
from kinprune.errors import BudgetError
from kinprune.evaluation import Evaluation, evaluate, lay_out
from kinprune.importance import Scores, draw_batches, normalise, score
from kinprune.inheritance import Donor, inherit
from kinprune.kin import Neighbour, find_kin, rank_exactly
from kinprune.pruning import OnStep
from kinprune.repair import repair
from kinprune.selection import Budget, Selection
from kinprune.tasks import DecodedTask, Split
from kinprune.training import TrainingResult, fine_tune, hold_back
from kinprune.transferability import Target
from kinprune.units import Costs, Mask, UnitSpace, extract
from kinprune.voting import Ballot, neighbour_weights

BROAD = 2
"""A neighbour of so many times the target's classes has learnt more than a kin of as many can."""


@dataclass(frozen=True, eq=False)
class Sized:
    """The model for one goal: ``start`` in closed form before any step, ``final`` after them, on the test images.

    ``inherited`` is where its weights come from: the plan's inheritance, or what *auto* came to.
    """

    goal: Goal
    model: nn.Module
    selection: Selection
    ballot: Ballot
    inherited: Inheritance
    closed_form: ClosedForm
    training: TrainingResult
    start: Evaluation
    final: Evaluation

    @property
    def budget(self) -> Budget:
        """What was asked for."""
        return self.goal.budget


@dataclass(frozen=True, eq=False)
class Adapted:
    """What adapting gave: a model for each goal, and who they were learnt from.

    ``weights`` says how much each of the ``neighbours`` counted, ``voters`` the places of those that voted, and
    ``blend`` what the plan's blend came to. ``whole_model`` is the backbone with a closed-form
    head, ``dense`` what it answers on the test images and ``whole`` its costs. ``seconds`` is by stage.
    """

    sizes: tuple[Sized, ...]
    plan: AdaptPlan
    backbone: Backbone
    space: UnitSpace
    whole: Costs
    neighbours: tuple[Neighbour, ...]
    weights: tuple[float, ...]
    voters: tuple[int, ...]
    blend: float
    probe: Probe
    whole_model: nn.Module
    dense: Evaluation
    seconds: dict[str, float]


def adapt(
    task: DecodedTask,
    bank: Bank | str | Path,
    budgets: Budget | Goal | Sequence[Budget | Goal],
    plan: AdaptPlan | None = None,
    *,
    backbone: Backbone | None = None,
    space: UnitSpace | None = None,
    without: Sequence[str] = (),
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> Adapted:
    """Make the bank's backbone small for a new task, in one shot, from what its nearest kin learnt.

    Several ``budgets`` share features, neighbours and, with SMSP, one score mask; their masks then nest. A ``Goal`` is
    a budget on a device: one score mask serves all devices, and each has widths that it likes. A limit in milliseconds
    on a device that is this machine is not left to prediction: models that turn out slower are cut further. The
    ``backbone`` and its unit ``space`` are the bank's own where none are given. Records with a key in ``without`` are
    not asked. ``on_step(stage, step, steps)`` is called when a stage begins, with step 0, and after every training
    step. Ctrl-C during a fine-tuning keeps the best state so far (``training.stopped``) and goes on to the next size.

    Raises:
        BankError: the bank is empty, damaged, or of another backbone, preprocessing or unit space.
        BudgetError: a budget cannot be reached; said before any work.
    """
    plan = AdaptPlan() if plan is None else plan
    bank = bank if isinstance(bank, Bank) else open_bank(bank)
    wanted = [budgets] if isinstance(budgets, Budget | Goal) else list(budgets)
    if not wanted:
        raise BudgetError("no budget was given, expected at least one")
    work, goals = _begin(task, bank, wanted, plan, backbone, space, device, on_step)
    neighbours, weights = work.find(without)
    lessons = work.read_lessons(neighbours)
    donors = work.donors(neighbours, lessons, weights)
    choice = work.choose(neighbours, lessons, weights, donors, goals)
    choice = work.settle(choice, donors, goals)
    with work.stage("evaluate", "whole model"):
        dense = evaluate(work.dense, task.test, task.preprocessing)
    sizes = tuple(work.finish(goal, choice, place, donors) for place, goal in enumerate(goals))
    return Adapted(
        sizes,
        plan,
        work.backbone,
        work.space,
        work.space.cost(work.space.whole_mask()),
        tuple(neighbours),
        tuple(weights),
        choice.trial.voters,
        choice.trial.blend,
        work.probe,
        work.dense,
        dense,
        work.seconds,
    )


@dataclass(frozen=True, eq=False)
class _Start:
    """A model in closed form, with weights from where ``inherited`` says."""

    inherited: Inheritance
    model: nn.Module
    closed_form: ClosedForm

    @property
    def judged(self) -> float:
        """How well images that had no part in it are answered; equal where nothing can be said."""
        return self.closed_form.judged or 0.0

    def surely_beats(self, other: _Start) -> bool:
        """Whether images that had no part in either are surely answered better."""
        return self.closed_form.judging.surely_beats(other.closed_form.judging)


@dataclass(frozen=True, eq=False)
class _Choice:
    """The way that was chosen for all sizes, and the start of the smallest, at ``place``, that it was chosen by."""

    trial: Trial
    ballots: Sequence[Ballot]
    selections: Sequence[Selection]
    place: int
    start: _Start


@dataclass(eq=False)
class _Work:
    """An adaptation under way: what all its sizes share."""

    task: DecodedTask
    bank: Bank
    plan: AdaptPlan
    backbone: Backbone
    space: UnitSpace
    device: str
    on_step: OnStep | None
    fit: Split
    guard: Split | None
    dense: nn.Module
    target: Target
    probe: Probe
    answers: Tensor | None
    seconds: dict[str, float]

    @contextmanager
    def stage(self, name: str, shown: str) -> Iterator[None]:
        with _timed(self.seconds, name, shown, self.on_step):
            yield

    def find(self, without: Sequence[str]) -> tuple[list[Neighbour], list[float]]:
        search = self.plan.search
        with self.stage("kin", "kin"):
            neighbours = find_kin(self.bank, self.target, self.task.classes, search, without=without)
            if search.exact and search.which == "nearest":
                neighbours = rank_exactly(
                    neighbours, self.bank, self.backbone, self.space, self.fit.images, self.target, search, self.device
                )
            similarities = [neighbour.similarity for neighbour in neighbours]
            weights = neighbour_weights(similarities, self.plan.weighting, self.plan.temperature)
        return neighbours, weights.tolist()

    def own_scores(self) -> Scores:
        """The target's own importance on the whole model."""
        with self.stage("own scores", "scoring"):
            seed = self.plan.recipe.seed
            plan, device = self.plan, self.device
            batches = draw_batches(
                self.fit, self.task.preprocessing, plan.score_images, plan.score_batch, seed=seed, device=device
            )
            values = score(plan.criterion, self.dense, self.space, batches, seed=seed)
        return normalise(self.space, values, self.plan.normalisation)

    def read_lessons(self, neighbours: Sequence[Neighbour]) -> Lessons:
        with self.stage("vote", "vote"):
            return self.bank.lessons([neighbour.entry.id for neighbour in neighbours])

    def settle(self, choice: _Choice, donors: Sequence[Donor], goals: Sequence[Goal]) -> _Choice:
        """Cut further what this machine, where it is the device, runs slower than it may.

        Latency does not depend on weights: each model is timed before it has any of its own.
        """
        selections = list(choice.selections)
        for place, goal in enumerate(goals):
            if timed_here(goal):
                with self.stage("settle", "latency"):
                    selections[place] = self.settled(choice.ballots[place], goal, selections[place])
        start = choice.start
        if selections[choice.place] is not choice.selections[choice.place]:
            start = self.begin(selections[choice.place].mask, donors, choice.trial)
        return replace(choice, selections=selections, start=start)

    def settled(self, ballot: Ballot, goal: Goal, selection: Selection) -> Selection:
        """The selection whose model, timed on this machine, keeps the goal's limit in milliseconds."""
        task = self.task

        def milliseconds(one: Selection) -> float:
            small = extract(self.dense, self.space, one.mask)
            return time_model(small, goal, task.classes, task.preprocessing, self.fit.images)

        assert goal.budget.latency_ms is not None
        return settle(
            goal.budget.latency_ms,
            selection,
            lambda aim: pick(self.space, ballot, goal, self.plan, replace(goal.budget, latency_ms=aim)),
            milliseconds,
        )

    def donors(self, neighbours: Sequence[Neighbour], lessons: Lessons, weights: Sequence[float]) -> list[Donor]:
        """The neighbours' pruned models; only the nearest's where no other is asked for."""
        if self.plan.inheritance == "backbone":
            return []
        with self.stage("inherit", "neighbours' weights"):
            count = 1 if self.plan.inheritance == "nearest" else len(neighbours)
            asked = zip(neighbours[:count], lessons.kept[:count], weights[:count], strict=True)
            return [
                Donor(Mask(kept, self.space.fingerprint), self.bank.tensors(neighbour.entry), weight)
                for neighbour, kept, weight in asked
            ]

    def begin(self, mask: Mask, donors: Sequence[Donor], trial: Trial) -> _Start:
        """Extract a model with the weights it inherits, and bring it to its start in closed form."""
        lenders = {"backbone": (), "nearest": trial.voters[:1]}.get(trial.inherited, trial.voters)
        given = [donors[place] for place in lenders]
        with self.stage("inherit", "extraction"):
            small = (
                inherit(self.dense, self.space, mask, given, quiet=True)
                if given
                else extract(self.dense, self.space, mask)
            )
            lay_out(small)
        with self.stage("closed form", "closed form"):
            closed = repair(
                small,
                self.dense,
                self.space,
                mask,
                self.fit,
                self.task.preprocessing,
                head=self.backbone.head,
                reconstruct=self.plan.reconstruct,
                trained=bool(given),
                intact=len(given) == 1 and given[0].mask == mask,
                method=self.plan.head,
                seed=self.plan.recipe.seed,
            )
        return _Start(trial.inherited, small, closed)

    def trials(self, neighbours: Sequence[Neighbour]) -> tuple[Trial, ...]:
        """The ways that the plan leaves open; the first is a neighbour that is ``BROAD``, if there is one.

        That is all where images are too few to tell (see ``can_judge``): so few could only spoil what it learnt.
        """
        plan, every = self.plan, tuple(range(len(neighbours)))
        if plan.inheritance != "auto":
            blends = (0.0, 1.0) if plan.blend is None else (plan.blend,)
            return tuple(Trial(every, blend, plan.inheritance) for blend in blends)
        kin = 0.0 if plan.blend is None else plan.blend
        kin_alone = (Trial(every, kin, "average"), Trial(every, kin, "backbone"))
        if plan.blend is not None or plan.search.which != "nearest":
            return kin_alone
        counts = [len(neighbour.entry.classes) for neighbour in neighbours]
        broadest, nearest = (Trial((place,), 0.0, "nearest") for place in (counts.index(max(counts)), 0))
        others = (*kin_alone, nearest, broadest, Trial(every, 1.0, "backbone"))
        if not self.is_broad(neighbours[broadest.voters[0]]):
            return tuple(dict.fromkeys(others))
        enough = can_judge(self.fit.labels, len(self.task.classes))
        return tuple(dict.fromkeys((broadest, *(others if enough else ()))))

    def is_broad(self, neighbour: Neighbour) -> bool:
        """Whether it has learnt more than a kin of as many classes as the target's can."""
        return len(neighbour.entry.classes) >= BROAD * len(self.task.classes)

    def choose(
        self,
        neighbours: Sequence[Neighbour],
        lessons: Lessons,
        weights: Sequence[float],
        donors: Sequence[Donor],
        goals: Sequence[Goal],
    ) -> _Choice:
        """Of the ways that are open, the one whose smallest model answers best in closed form.

        A broad neighbour gives way only to what is surely better: it is seldom worse, and images are few.
        """
        trials = self.trials(neighbours)
        own = self.own_scores() if any(trial.blend for trial in trials) else None
        broad = len(trials[0].voters) == 1 and self.is_broad(neighbours[trials[0].voters[0]])
        first: _Choice | None = None
        best: _Choice | None = None
        for trial in trials:
            with self.stage("vote", "vote"):
                ballots, selections = elect(self.space, Electorate(lessons, weights, own), trial, goals, self.plan)
            place = min(range(len(goals)), key=lambda number: selections[number].costs.parameters)
            start = self.begin(selections[place].mask, donors, trial)
            choice = _Choice(trial, ballots, selections, place, start)
            if first is None or best is None:
                first = best = choice
            elif start.judged < best.start.judged and (not broad or start.surely_beats(first.start)):
                best = choice
        assert best is not None
        return best

    def start_of(self, choice: _Choice, place: int, donors: Sequence[Donor]) -> _Start:
        """The start of the size at ``place``: neighbours' weights are of small models, and may not suit larger ones."""
        if place == choice.place:
            return choice.start
        names: tuple[Inheritance, ...] = (choice.trial.inherited,)
        if self.plan.inheritance == "auto" and choice.trial.blend < 1:
            names = ("nearest" if choice.trial.inherited == "nearest" else "average", "backbone")
        mask = choice.selections[place].mask
        ways = [replace(choice.trial, inherited=name) for name in names]
        return min((self.begin(mask, donors, way) for way in ways), key=lambda start: start.judged)

    def finish(self, goal: Goal, choice: _Choice, place: int, donors: Sequence[Donor]) -> Sized:
        """Extract, repair, fine-tune and evaluate the model of one goal."""
        ballot, selection = choice.ballots[place], choice.selections[place]
        begun = self.start_of(choice, place, donors)
        small, closed = begun.model, begun.closed_form
        with self.stage("evaluate", "evaluation"):
            start = evaluate(small, self.task.test, self.task.preprocessing)
        steps = self.plan.recipe.steps
        with self.stage("fine-tune", ""):
            if self.on_step is not None:
                self.on_step("fine-tuning", 0, steps)
            training = fine_tune(
                small,
                self.fit,
                self.task.preprocessing,
                self.plan.recipe,
                device=self.device,
                held_back=self.guard,
                answers=self.answers,
                begin=closed.trainable,
                memory_limit=self.plan.train_memory,
                on_step=None
                if self.on_step is None
                else lambda step, of, _loss: self.on_step and self.on_step("fine-tuning", step, of),
            )
        with self.stage("evaluate", "evaluation"):
            final = evaluate(small, self.task.test, self.task.preprocessing) if training.best_step else start
        return Sized(goal, small, selection, ballot, begun.inherited, closed, training, start, final)


def _begin(
    task: DecodedTask,
    bank: Bank,
    budgets: Sequence[Budget | Goal],
    plan: AdaptPlan,
    backbone: Backbone | None,
    space: UnitSpace | None,
    device: str,
    on_step: OnStep | None,
) -> tuple[_Work, list[Goal]]:
    """Refuse what does not fit the bank; then the one pass of features that all else is found from."""
    seconds: dict[str, float] = {}
    if backbone is None:
        with _timed(seconds, "load", "backbone", on_step):
            backbone = load_bank_backbone(bank, len(task.classes), seed=plan.recipe.seed)
    check_task(task, bank, backbone)
    if space is None:
        with _timed(seconds, "units", "units", on_step):
            space = bank_space(bank, backbone)
    else:
        check_space(bank.header, space)
    goals = check_goals(space, budgets, plan)
    check_training_memory(backbone, space, goals, plan)
    fit, guard = hold_back(task.train, plan.recipe.hold_back, plan.recipe.seed)
    dense = copy.deepcopy(backbone.model).to(device)
    lay_out(dense)
    with _timed(seconds, "features", "features", on_step):
        features = head_inputs(dense, backbone.head, fit.images, task.preprocessing)
        probe = solve_probe(dense, backbone.head, features, fit.labels, len(task.classes), method=plan.head)
    target = Target(features.float().numpy(), fit.labels.numpy(), len(task.classes))
    answers = answers_of(probe, features) if plan.distil else None
    work = _Work(task, bank, plan, backbone, space, device, on_step, fit, guard, dense, target, probe, answers, seconds)
    return work, goals


@contextmanager
def _timed(seconds: dict[str, float], name: str, shown: str, on_step: OnStep | None) -> Iterator[None]:
    if on_step is not None and shown:
        on_step(shown, 0, 0)
    started = perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + perf_counter() - started
