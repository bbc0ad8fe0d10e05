"""What a model answered: the confusion of its classes, and test images that it got right and wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kinprune import quantities
from kinprune.adaptation import Sized
from kinprune.evaluation import Evaluation, predict
from kinprune.report.pictures import thumbnail
from kinprune.tasks import DecodedTask

SHOWN = 12
"""Images right, and images wrong."""
MATRIX_CLASSES = 30
"""Above it a matrix cannot be read, and only the commonest confusions are shown."""
NAMED_COLUMNS = 8
"""Above it a matrix's columns have numbers for names."""
CONFUSIONS = 10


@dataclass(frozen=True)
class Cell:
    """Images of one class that got one answer; ``share`` is of the class's images."""

    count: int
    share: float
    right: bool


@dataclass(frozen=True)
class MatrixRow:
    """A true class and its answers; ``right`` is the class's accuracy."""

    name: str
    cells: tuple[Cell, ...]
    right: str


@dataclass(frozen=True)
class Confused:
    """Images of class ``true`` that were answered ``answer``."""

    true: str
    answer: str
    count: int
    images: int


@dataclass(frozen=True)
class Matrix:
    """A model's confusion. ``rows`` is empty where there are too many classes to read; ``commonest`` come first."""

    name: str
    accuracy: float
    rows: tuple[MatrixRow, ...]
    named: bool
    commonest: tuple[Confused, ...]


@dataclass(frozen=True)
class Answer:
    """A test image, what it shows and what the model says, with the probability it gives to that."""

    number: int
    picture: str
    true: str
    answer: str
    probability: float


@dataclass(frozen=True)
class Answers:
    """Test images right and wrong, some of ``all_right`` and ``all_wrong``."""

    right: tuple[Answer, ...]
    wrong: tuple[Answer, ...]
    all_right: int
    all_wrong: int


def matrix_of(name: str, evaluation: Evaluation, classes: tuple[str, ...]) -> Matrix:
    """An evaluation's confusion, ready to be shown."""
    confusion = evaluation.confusion.tolist()
    totals = [sum(row) for row in confusion]
    pairs = [
        Confused(classes[true], classes[answer], count, totals[true])
        for true, row in enumerate(confusion)
        for answer, count in enumerate(row)
        if count and true != answer
    ]
    pairs.sort(key=lambda pair: -pair.count)
    rows = tuple(
        MatrixRow(
            class_name,
            tuple(Cell(count, count / total if total else 0.0, place == true) for place, count in enumerate(row)),
            quantities.NOTHING if right is None else quantities.percent(right),
        )
        for true, (class_name, row, total, right) in enumerate(
            zip(classes, confusion, totals, evaluation.per_class, strict=True)
        )
    )
    readable = len(classes) <= MATRIX_CLASSES
    return Matrix(
        name, evaluation.accuracy, rows if readable else (), len(classes) <= NAMED_COLUMNS, tuple(pairs[:CONFUSIONS])
    )


def sample_answers(sized: Sized, task: DecodedTask, seed: int) -> Answers:
    """Some of the model's answers on the test images.

    The wrong ones are those it is surest of, surest first; the right ones are drawn by ``seed``, in the test's order.
    """
    probabilities, answers = predict(sized.model, task.test.images, task.preprocessing).max(dim=1)
    correct = answers == task.test.labels
    (wrong,), (right,) = (~correct).nonzero(as_tuple=True), correct.nonzero(as_tuple=True)
    surest = wrong[torch.sort(probabilities[wrong], descending=True, stable=True).indices][:SHOWN]
    drawn = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))[:SHOWN]

    def show(places: Tensor) -> tuple[Answer, ...]:
        return tuple(
            Answer(
                number=place + 1,
                picture=thumbnail(task.test.images[place], 128),
                true=task.classes[int(task.test.labels[place])],
                answer=task.classes[int(answers[place])],
                probability=float(probabilities[place]),
            )
            for place in places.tolist()
        )

    return Answers(show(right[drawn.sort().values]), show(surest), len(right), len(wrong))
