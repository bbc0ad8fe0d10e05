"""All that a report shows of an adaptation, as plain values: the page only lays them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kinprune import quantities
from kinprune.adapt_plan import AdaptPlan
from kinprune.adaptation import Adapted
from kinprune.delivery import versions
from kinprune.report.answers import Answers, Matrix, matrix_of, sample_answers
from kinprune.report.curves import Chart, family_charts, learning_charts
from kinprune.report.inputs import Tried, check_inputs
from kinprune.report.kinship import ClassCard, NeighbourRow, neighbour_rows, target_classes
from kinprune.report.sizes import (
    Figure,
    GroupRow,
    SizeRow,
    figures,
    group_rows,
    latency_of,
    size_rows,
    smallest,
)
from kinprune.tasks import DecodedTask

METHODS = {
    "smsp": "one score mask of the neighbours, cut to every size (SMSP)",
    "mvp": "a vote of the neighbours on the units of each size (MVP)",
}
WEIGHTS = {
    "average": "the mean of the neighbours' that kept them, the backbone's where none did",
    "nearest": "neighbour {voter}'s, the backbone's where it has none",
    "backbone": "the backbone's",
}
SEARCHES = {
    "nearest": "the nearest source tasks by {measure}",
    "farthest": "the farthest source tasks by {measure}, a control",
    "random": "source tasks drawn at random, a control",
    "all": "all source tasks of the bank, a control",
}


@dataclass(frozen=True)
class Training:
    """How one size was fine-tuned; ``steps`` were made, and the state after ``best_step`` of them was kept."""

    name: str
    steps: int
    best_step: int
    optimiser: str
    learning_rate: str
    precision: str
    images_seen: int
    reconstructed: bool
    seconds: str


@dataclass(frozen=True)
class Making:
    """How it was made, in pairs of a name and a value; a stage also has its share of all the time."""

    stages: tuple[tuple[str, str, float], ...]
    total: str
    trainings: tuple[Training, ...]
    plan: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]
    backbone: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Contents:
    """The whole report. ``smallest`` is the place of the smallest of ``sizes``, whose answers are shown; ``notes`` are
    pairs of whom they are about and what they say.
    """

    task: str
    backbone: str
    classes: tuple[ClassCard, ...]
    images: tuple[int, int]
    units: str
    weights: str
    search: str
    measure: str
    dense_accuracy: float
    whole: tuple[Figure, ...]
    whole_latency: Figure | None
    timed: bool
    sizes: tuple[SizeRow, ...]
    smallest: int
    met: bool
    notes: tuple[tuple[str, str], ...]
    neighbours: tuple[NeighbourRow, ...]
    groups: tuple[GroupRow, ...]
    learning: tuple[Chart, ...]
    family: tuple[Chart, ...]
    matrices: tuple[Matrix, ...]
    answers: Answers
    making: Making


def contents_of(
    adapted: Adapted,
    task: DecodedTask,
    *,
    samples: Mapping[str, Tensor] | None = None,
    latencies: Sequence[float | None] | None = None,
    tried: Sequence[Tried] | None = None,
) -> Contents:
    """Gather a report; see ``write_report``. The smallest model is run on the test images, for its answers."""
    check_inputs(adapted, task, samples, latencies, tried)
    rows = size_rows(adapted, latencies, tried)
    least = smallest(adapted)
    search = adapted.plan.search
    return Contents(
        task=task.name,
        backbone=adapted.backbone.spec.name,
        classes=target_classes(task),
        images=(len(task.train), len(task.test)),
        units=_units_from(adapted),
        weights=WEIGHTS[adapted.sizes[least].inherited].format(voter=adapted.voters[0] + 1),
        search=SEARCHES[search.which].format(measure=search.measure),
        measure=search.measure,
        dense_accuracy=adapted.dense.accuracy,
        whole=figures(adapted.whole, adapted.whole),
        whole_latency=None if latencies is None else latency_of(latencies[0]),
        timed=latencies is not None,
        sizes=rows,
        smallest=least,
        met=all(limit.met for row in rows for limit in row.limits),
        notes=_notes(rows),
        neighbours=neighbour_rows(adapted, samples),
        groups=group_rows(adapted),
        learning=learning_charts(adapted, rows),
        family=family_charts(adapted, rows),
        matrices=_matrices(adapted, task, rows, least),
        answers=sample_answers(adapted.sizes[least], task, adapted.plan.recipe.seed),
        making=_making(adapted, rows),
    )


def _units_from(adapted: Adapted) -> str:
    own = f"the task's own importance ({adapted.plan.criterion})"
    if adapted.blend == 1:
        return f"{own}, asked for alone" if adapted.plan.blend == 1 else f"{own}, by which the start was better"
    if len(adapted.voters) == 1:
        return f"the ranking of neighbour {adapted.voters[0] + 1} alone"
    kin = METHODS[adapted.plan.method]
    return kin if adapted.blend == 0 else f"{kin}, and by {quantities.percent(adapted.blend)} from {own}"


def _matrices(adapted: Adapted, task: DecodedTask, rows: Sequence[SizeRow], least: int) -> tuple[Matrix, ...]:
    """The smallest size's first, the whole model's last."""
    order = [least, *(place for place in range(len(rows)) if place != least)]
    sizes = [matrix_of(rows[place].name, adapted.sizes[place].final, task.classes) for place in order]
    return (*sizes, matrix_of("whole model", adapted.dense, task.classes))


def _notes(rows: Sequence[SizeRow]) -> tuple[tuple[str, str], ...]:
    """(Whom it is about, note): each said once."""
    texts = dict.fromkeys(note for row in rows for note in row.notes)
    return tuple(("; ".join(row.name for row in rows if text in row.notes), text) for text in texts)


def _making(adapted: Adapted, rows: Sequence[SizeRow]) -> Making:
    total = sum(adapted.seconds.values())
    spec, preprocessing = adapted.backbone.spec, adapted.backbone.preprocessing
    height, width = preprocessing.image_size
    return Making(
        stages=tuple(
            (name, quantities.seconds(taken), taken / total if total else 0.0)
            for name, taken in adapted.seconds.items()
        ),
        total=quantities.seconds(total),
        trainings=tuple(
            Training(
                name=row.name,
                steps=len(sized.training.losses),
                best_step=sized.training.best_step,
                optimiser=sized.training.optimiser,
                learning_rate=quantities.setting(sized.training.learning_rate),
                precision=sized.training.precision,
                images_seen=sized.training.images_seen,
                reconstructed=sized.closed_form.reconstructed,
                seconds=quantities.seconds(sized.training.seconds),
            )
            for row, sized in zip(rows, adapted.sizes, strict=True)
        ),
        plan=_settings(adapted.plan),
        versions=tuple(versions().items()),
        backbone=(
            ("name", spec.name),
            *((name, quantities.setting(value)) for name, value in spec.arguments.items()),
            ("images", f"{height} x {width} pixels, {preprocessing.interpolation}, crop {preprocessing.crop_pct:g}"),
            ("fingerprint", adapted.backbone.fingerprint),
            ("units", f"{len(adapted.space):,} in {quantities.plural(len(adapted.space.groups), 'layer')}"),
        ),
    )


def _settings(plan: AdaptPlan) -> tuple[tuple[str, str], ...]:
    """Every setting of the plan, those of its search and recipe among them, under dotted names."""

    def flat(values: dict[str, Any], before: str) -> list[tuple[str, str]]:
        found = []
        for name, value in values.items():
            shown = name.replace("_", " ")
            found += (
                flat(value, f"{shown}: ") if isinstance(value, dict) else [(before + shown, quantities.setting(value))]
            )
        return found

    return tuple(flat(asdict(plan), ""))
