"""How to adapt: who is asked, how they are heard, and how the model is made and trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from kinprune.calibration.head import HeadMethod
from kinprune.errors import BudgetError
from kinprune.importance import CRITERIA, Criterion, Normalisation
from kinprune.kin import Search
from kinprune.selection import Allocation
from kinprune.training import Recipe
from kinprune.voting import TEMPERATURE, Weighting

Method = Literal["mvp", "smsp"]
ScoreMask = Literal["kept", "soft"]
Inheritance = Literal["auto", "average", "nearest", "backbone"]


@dataclass(frozen=True)
class AdaptPlan:
    """How to adapt.

    ``method`` *mvp* lets the neighbours vote on the units for each budget, *smsp* makes one score mask for all of
    them: of the units that the neighbours' own pruned models have (``score_mask`` *kept*), or of their mean *soft*
    scores. ``search`` says who the neighbours are, ``weighting`` and ``temperature`` how much each counts (see
    ``neighbour_weights``). ``inheritance`` is where the kept units' weights come from: the *average* of the neighbours
    that kept them, the *nearest* neighbour alone, or the *backbone*; *auto* tries the first and the last. ``blend`` is
    the share of the target's own ``criterion`` in the vote, from 0 to 1; None tries the kin alone and the target
    alone. Where both are left open, the nearest neighbour's units with its own weights are tried too, and those of the
    one with the most classes. What is tried is tried on the smallest model in closed form, and the best answers to
    images that had no part in it decide for all sizes; a larger model takes the backbone's weights where these answer
    better. A neighbour with twice the target's classes or more is left only for what is surely better by these images;
    with fewer than 16 of a class none can be spared, and it is taken as it is. ``distil`` lets the whole model teach
    the small one, by what it answers to each training image as it is. ``train_memory`` is the most bytes that
    fine-tuning may take, above what was taken before it; None for no limit. ``recipe`` is the fine-tuning, and its
    seed the seed of everything.
    """

    method: Method = "smsp"
    score_mask: ScoreMask = "kept"
    search: Search = field(default_factory=Search)
    weighting: Weighting = "softmax"
    temperature: float = TEMPERATURE
    inheritance: Inheritance = "auto"
    blend: float | None = None
    criterion: Criterion = "taylor"
    allocation: Allocation = "layer"
    normalisation: Normalisation = "mean"
    multiple: int = 1
    reconstruct: bool = True
    distil: bool = True
    head: HeadMethod = "ridge"
    score_images: int = 256
    score_batch: int = 64
    train_memory: int | None = None
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        for name, word, known in (
            ("method", self.method, get_args(Method)),
            ("score mask", self.score_mask, get_args(ScoreMask)),
            ("inheritance", self.inheritance, get_args(Inheritance)),
            ("weighting", self.weighting, get_args(Weighting)),
            ("criterion", self.criterion, CRITERIA),
            ("allocation", self.allocation, get_args(Allocation)),
            ("head", self.head, get_args(HeadMethod)),
        ):
            if word not in known:
                raise BudgetError(f"there is no {name} '{word}', expected one of: {', '.join(known)}")
        if self.blend is not None and not 0 <= self.blend <= 1:
            raise BudgetError(f"the blend is {self.blend}, expected the share of the target's own scores, from 0 to 1")
        if self.multiple < 1:
            raise BudgetError(f"multiple is {self.multiple}, expected a whole number of at least 1")
        if self.train_memory is not None and self.train_memory < 1:
            raise BudgetError(f"train_memory is {self.train_memory}, expected a number of bytes above 0, or None")
