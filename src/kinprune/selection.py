"""Selection: scores and a budget to the best-scoring mask that fits.

Every unit gets a priority, and the order of priorities is one path from the whole model to the smallest: the masks on
it nest, and a budget is met by walking it until all limits hold. Where the step that met them was a coarse one (a
head, a rounded block of filters) and left more than the tolerance unused, smaller units further down are taken in
again while they fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kinprune.errors import BudgetError
from kinprune.importance import Normalisation, Scores, normalise, rank
from kinprune.units import Costs, Mask, UnitSpace

Allocation = Literal["layer", "global"]
Counts = NDArray[np.int64]

TOLERANCE = 0.01
"""The share of a budget that may be left unused before smaller units are taken in again."""


@dataclass(frozen=True)
class Budget:
    """Upper limits, all of which hold together; None is no limit.

    ``keep`` is the share of units to keep, in (0, 1]; the others are absolute: numbers in parameters,
    multiply-accumulates for one image, bytes of weights, bytes of peak memory for one image (``units.Costs``), and
    milliseconds of one run on a device.
    """

    keep: float | None = None
    parameters: int | None = None
    macs: int | None = None
    weight_bytes: int | None = None
    peak_memory_bytes: int | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if all(value is None for value in given.values()):
            raise BudgetError(
                "no budget was given, expected a keep ratio (--keep) or a limit in parameters, MACs or bytes "
                "(--max-params, --max-macs, --max-weights, --max-memory) or milliseconds (--max-latency)"
            )
        for name, value in given.items():
            if value is None:
                continue
            if not math.isfinite(value) or value <= 0:
                raise BudgetError(f"the budget {name} is {value}, expected a number above 0")
        if self.keep is not None and self.keep > 1:
            raise BudgetError(f"the keep ratio is {self.keep}, expected a share above 0 and at most 1, such as 0.1")

    def limits(self) -> dict[str, float]:
        """The absolute limits that were given."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "keep"}
        return {
            name: value if name == "latency_ms" else int(value) for name, value in named.items() if value is not None
        }


class CostFunctions(Protocol):
    """What masks cost, as functions of kept counts ``[n, g]``: ``units.CostModel``, or a device's.

    A device's has ``latency_ms(counts)`` as well where it was profiled.
    """

    def parameters(self, counts: Counts) -> Counts: ...
    def macs(self, counts: Counts) -> Counts: ...
    def weight_bytes(self, counts: Counts) -> Counts: ...
    def peak_memory_bytes(self, counts: Counts) -> Counts: ...
    def of(self, counts: Sequence[int] | Counts) -> Costs: ...


@dataclass(frozen=True, eq=False)
class Selection:
    """A mask, its exact costs, and ``slack``: the unused share of the tightest limit, with ``note`` where that is over
    the tolerance, saying why.
    """

    mask: Mask
    costs: Costs
    slack: float
    note: str | None


def select(
    space: UnitSpace,
    scores: Scores,
    budget: Budget,
    *,
    allocation: Allocation = "layer",
    normalisation: Normalisation = "mean",
    multiple: int = 1,
    ties: Sequence[Scores] = (),
    within: Mask | None = None,
    costs: CostFunctions | None = None,
) -> Selection:
    """The best-scoring mask under a budget.

    ``allocation="layer"`` keeps the same share of every group (as nearly as whole units allow), ``"global"`` compares
    normalised scores over all groups. ``multiple`` rounds layer widths to multiples of 8, 16 ... (or leaves them
    whole). ``ties`` break equal scores, in order, then the lower index wins. ``within`` only keeps units of that mask:
    give it the mask of a larger budget and the two nest whatever the budgets are. ``costs`` are what the limits count
    in: the space's own where none are given, else a device's.

    Raises:
        BudgetError: scores are malformed, or the budget cannot be reached; the message has the smallest reachable.
    """
    values = _checked(space, scores, multiple, within)
    blocks = _blocks(space, values, allocation, normalisation, multiple, ties, within)
    if budget.keep is not None:
        blocks = _up_to_share(space, blocks, budget.keep, allocation)
    limits = budget.limits()
    costs = space.costs if costs is None else costs
    if "latency_ms" in limits and not hasattr(costs, "latency_ms"):
        raise BudgetError("a limit in milliseconds needs a device's profile: make one with kinprune device profile")
    _reachable(costs, blocks.floor, limits)
    counts, filled = _walk(costs, blocks, limits)
    kept = blocks.places < counts[space.group_of]
    slack, note = _slack(costs, counts, limits, filled, multiple)
    return Selection(Mask(kept, space.fingerprint), costs.of(counts), slack, note)


def select_family(
    space: UnitSpace,
    scores: Scores,
    budgets: Sequence[Budget],
    *,
    allocation: Allocation = "layer",
    normalisation: Normalisation = "mean",
    multiple: int = 1,
    ties: Sequence[Scores] = (),
    costs: CostFunctions | None = None,
) -> list[Selection]:
    """One nested selection a budget, from one set of scores; budgets in any order, results in the same."""
    how: dict[str, Any] = {
        "allocation": allocation,
        "normalisation": normalisation,
        "multiple": multiple,
        "ties": ties,
        "costs": costs,
    }
    alone = [select(space, scores, budget, **how) for budget in budgets]
    family: dict[int, Selection] = {}
    larger: Mask | None = None
    for place in sorted(range(len(budgets)), key=lambda place: -alone[place].costs.parameters):
        family[place] = select(space, scores, budgets[place], within=larger, **how)
        larger = family[place].mask
    return [family[place] for place in range(len(budgets))]


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The path: blocks of units in the order of removal.

    ``places [u]`` is each unit's place in its group; ``floor`` and ``ceiling`` are counts a group that never go below
    or above; ``groups`` and ``sizes`` tell for each removal, first to last, how many units of which group go.
    """

    places: Counts
    floor: Counts
    ceiling: Counts
    groups: Counts
    sizes: Counts

    def counts(self, removed: int) -> Counts:
        """The counts after the first ``removed`` removals."""
        gone = np.bincount(self.groups[:removed], self.sizes[:removed], minlength=len(self.floor))
        return self.ceiling - gone.astype(np.int64)


def _checked(space: UnitSpace, scores: Scores, multiple: int, within: Mask | None) -> Scores:
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (len(space),):
        raise BudgetError(f"scores have the shape {values.shape}, expected ({len(space)},): one for each unit")
    if not np.isfinite(values).all():
        raise BudgetError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite numbers")
    if multiple < 1:
        raise BudgetError(f"widths cannot be rounded to multiples of {multiple}, expected 1 or more, such as 8")
    if within is not None:
        space.check(within)
    return values


def _blocks(
    space: UnitSpace,
    values: Scores,
    allocation: Allocation,
    normalisation: Normalisation,
    multiple: int,
    ties: Sequence[Scores],
    within: Mask | None,
) -> _Blocks:
    """Cut every group into blocks that keep widths allowed, and sort them by priority."""
    chosen = np.ones(len(space), dtype=bool) if within is None else within.kept
    # Units outside `within` go behind all others of their group.
    inside = np.where(chosen, 0.0, -1.0)
    places = rank(space, inside, (values, *ties))
    ceiling = space.counts(chosen)
    steps = np.array([_step(group.width, multiple) for group in space.groups], dtype=np.int64)
    floor = np.minimum(np.maximum(steps, 1), ceiling)
    if allocation == "layer":
        priority = -(places + 0.5) / space.sizes[space.group_of]
    elif allocation == "global":
        priority = normalise(space, values, normalisation)
    else:
        raise BudgetError(f"there is no allocation '{allocation}', expected layer or global")
    return _sorted_blocks(space, places, priority, steps, floor, ceiling)


def _step(width: int, multiple: int) -> int:
    """How many units of ``width`` indices make a multiple of ``multiple``."""
    return multiple // math.gcd(multiple, width)


def _sorted_blocks(
    space: UnitSpace, places: Counts, priority: Scores, steps: Counts, floor: Counts, ceiling: Counts
) -> _Blocks:
    removable = (places >= floor[space.group_of]) & (places < ceiling[space.group_of])
    units = np.flatnonzero(removable)
    groups = space.group_of[units]
    # Block numbers rise with the place; the last block of a group is short where its size is no multiple.
    numbers = places[units] // steps[groups]
    keys = groups * (int(space.sizes.max()) + 1) + numbers
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    best = np.full(len(first), -np.inf)
    np.maximum.at(best, inverse, priority[units])
    block_groups, block_numbers = groups[first], numbers[first]
    sizes = np.bincount(inverse, minlength=len(first)).astype(np.int64)
    # Lowest priority first; among equals the deeper place, then the later group.
    order = np.lexsort((-block_groups, -block_numbers, best))
    return _Blocks(places, floor, ceiling, block_groups[order], sizes[order])


def _up_to_share(space: UnitSpace, blocks: _Blocks, keep: float, allocation: Allocation) -> _Blocks:
    """Remove to a share of the units: of each group's, or of all together; the rest of the path stays."""
    if allocation == "layer":
        wanted = np.floor(space.sizes * keep + 1e-9).astype(np.int64)
        order = np.argsort(blocks.groups, kind="stable")
        groups, sizes = blocks.groups[order], blocks.sizes[order]
        before = np.cumsum(sizes) - sizes
        starts = np.append(before, 0)[np.searchsorted(groups, np.arange(len(wanted)), side="left")]
        removed = np.zeros(len(groups), dtype=bool)
        removed[order] = blocks.ceiling[groups] - (before - starts[groups]) > wanted[groups]
    else:
        excess = int(blocks.ceiling.sum()) - max(math.floor(len(space) * keep + 1e-9), 0)
        removed = np.cumsum(blocks.sizes) - blocks.sizes < excess
    gone = np.bincount(blocks.groups[removed], blocks.sizes[removed], minlength=len(blocks.floor)).astype(np.int64)
    rest = ~removed
    return _Blocks(blocks.places, blocks.floor, blocks.ceiling - gone, blocks.groups[rest], blocks.sizes[rest])


_MEASURES = {
    "parameters": "parameters",
    "macs": "multiply-accumulates",
    "weight_bytes": "bytes of weights",
    "peak_memory_bytes": "bytes of peak memory",
    "latency_ms": "ms",
}


def _cost(costs: CostFunctions, name: str, counts: Counts) -> float:
    """One cost of one mask's counts ``[g]``."""
    return float(np.asarray(getattr(costs, name)(counts[None]))[0])


def _fits(costs: CostFunctions, counts: Counts, limits: dict[str, float]) -> bool:
    """Whether ``counts [g]`` are within all limits."""
    return all(_cost(costs, name, counts) <= limit for name, limit in limits.items())


def _reachable(costs: CostFunctions, floor: Counts, limits: dict[str, float]) -> None:
    for name, limit in limits.items():
        smallest = _cost(costs, name, floor)
        if smallest > limit:
            # Rounded up, so that what is said can be reached.
            told, needed = (
                (f"{limit:,.6g}", f"{math.ceil(smallest * 1000) / 1000:,.6g}")
                if name == "latency_ms"
                else (f"{limit:,.0f}", f"{smallest:,.0f}")
            )
            raise BudgetError(
                f"the budget of {told} {_MEASURES[name]} cannot be reached: with the fewest units in every group "
                f"this model still needs {needed}: ask for at least that, add --stream, or take a smaller backbone"
            )


def _walk(costs: CostFunctions, blocks: _Blocks, limits: dict[str, float]) -> tuple[Counts, bool]:
    """The counts at the first point of the path within all limits, filled up where a coarse step overshot."""
    low, high = 0, len(blocks.groups)
    while low < high:
        middle = (low + high) // 2
        if _fits(costs, blocks.counts(middle), limits):
            high = middle
        else:
            low = middle + 1
    counts = blocks.counts(low)
    if not limits or low == 0 or _unused(costs, counts, limits) <= TOLERANCE:
        return counts, False
    return _fill(costs, blocks, counts, low, limits), True


def _unused(costs: CostFunctions, counts: Counts, limits: dict[str, float]) -> float:
    """The unused share of the tightest limit."""
    return min(1 - _cost(costs, name, counts) / limit for name, limit in limits.items())


def _fill(costs: CostFunctions, blocks: _Blocks, counts: Counts, removed: int, limits: dict[str, float]) -> Counts:
    """Take removed blocks in again, best first, wherever they fit; a group whose next block does not fit is done."""
    counts = counts.copy()
    done = np.zeros(len(counts), dtype=bool)
    for number in range(removed - 1, -1, -1):
        group, size = int(blocks.groups[number]), int(blocks.sizes[number])
        if done[group]:
            continue
        counts[group] += size
        if not _fits(costs, counts, limits):
            counts[group] -= size
            done[group] = True
            if done.all():
                break
    return counts


def _slack(
    costs: CostFunctions, counts: Counts, limits: dict[str, float], filled: bool, multiple: int
) -> tuple[float, str | None]:
    if not limits:
        return 0.0, None
    shares = {name: 1 - _cost(costs, name, counts) / limit for name, limit in limits.items()}
    name, slack = min(shares.items(), key=lambda pair: pair[1])
    if slack <= TOLERANCE:
        return slack, None
    if not filled:
        reason = "the whole model, or the keep ratio asked for, already fits"
    elif multiple > 1:
        reason = f"the next block of widths rounded to multiples of {multiple} would go over it"
    else:
        reason = "every further unit would go over it"
    return slack, f"{slack:.1%} of the {_MEASURES[name]} asked for are unused: {reason}"
