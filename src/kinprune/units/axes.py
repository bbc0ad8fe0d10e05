"""Axes: which dimensions of a model's tensors must be cut together.

Every dimension of every tensor seen while a model runs is an *axis*. Two axes that must keep the same indices
(a convolution's output and the batch norm behind it) are unified. An axis may turn out to be a product of others
(``qkv`` features are 3 x heads x head width, row-major) or a sum of others (a concatenation). Leaves that nothing
forbids to cut become groups of units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import prod

ONE = 0
"""The axis of size one: it is never cut, and products drop it."""


class Form(Enum):
    """How an axis is made."""

    LEAF = "leaf"
    PRODUCT = "product"
    SUM = "sum"


@dataclass
class Facts:
    """What is known of a leaf.

    ``fixed`` says why it cannot be cut; ``coupled`` that two activations are added along it (a residual stream);
    ``normalised`` that statistics are taken over it; ``active`` that it reaches the images' path.
    """

    fixed: str | None = None
    coupled: bool = False
    normalised: bool = False
    active: bool = False

    def absorb(self, other: Facts) -> None:
        """Keep whatever either of the two knows."""
        self.fixed = self.fixed or other.fixed
        self.coupled |= other.coupled
        self.normalised |= other.normalised
        self.active |= other.active


@dataclass
class Axes:
    """A union-find of axes whose leaves can be refined into products and sums. Axes are named by integers."""

    sizes: list[int] = field(default_factory=lambda: [1])
    forms: list[Form] = field(default_factory=lambda: [Form.LEAF])
    parts: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    facts: list[Facts] = field(default_factory=lambda: [Facts(fixed="a dimension of size one")])
    _parents: list[int] = field(default_factory=lambda: [ONE])

    def new(self, size: int, fixed: str | None = None) -> int:
        """A fresh leaf of ``size`` indices; size one gives ``ONE``."""
        return ONE if size == 1 else self._add(size, Form.LEAF, (), Facts(fixed))

    def _add(self, size: int, form: Form, parts: tuple[int, ...], facts: Facts) -> int:
        self.sizes.append(size)
        self.forms.append(form)
        self.parts.append(parts)
        self.facts.append(facts)
        self._parents.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def find(self, axis: int) -> int:
        """The axis that stands for all that were unified with this one."""
        parents = self._parents
        while parents[axis] != axis:
            parents[axis] = parents[parents[axis]]
            axis = parents[axis]
        return axis

    def size(self, axis: int) -> int:
        return self.sizes[axis]

    def form(self, axis: int) -> Form:
        return self.forms[self.find(axis)]

    def children(self, axis: int) -> tuple[int, ...]:
        return self.parts[self.find(axis)]

    def leaves(self, axis: int) -> list[int]:
        """The leaves below an axis, in order, each as its representative."""
        axis = self.find(axis)
        if self.forms[axis] is Form.LEAF:
            return [axis]
        return [leaf for part in self.parts[axis] for leaf in self.leaves(part)]

    def freeze(self, axis: int, reason: str) -> None:
        """Forbid cutting any leaf of an axis; the first reason stays."""
        for leaf in self.leaves(axis):
            if self.facts[leaf].fixed is None:
                self.facts[leaf].fixed = reason

    def is_fixed(self, axis: int) -> bool:
        return all(self.facts[leaf].fixed is not None for leaf in self.leaves(axis))

    def product(self, axes: Sequence[int]) -> int:
        """The axis that runs over ``axes`` row-major."""
        factors = [axis for axis in axes if self.sizes[axis] > 1]
        if not factors:
            return ONE
        if len(factors) == 1:
            return factors[0]
        return self._add(prod(self.sizes[axis] for axis in factors), Form.PRODUCT, tuple(factors), Facts())

    def sum(self, axes: Sequence[int]) -> int:
        """The axis that runs over ``axes`` one after the other."""
        if len(axes) == 1:
            return axes[0]
        parts = tuple(self._solid(axis) for axis in axes)
        return self._add(sum(self.sizes[axis] for axis in parts), Form.SUM, parts, Facts())

    def _solid(self, axis: int) -> int:
        """``ONE`` is dropped from products, but inside a sum it is one index: give it a leaf of its own."""
        return self._add(1, Form.LEAF, (), Facts("a dimension of size one")) if axis == ONE else axis

    def _refine(self, leaf: int, form: Form, sizes: Iterable[int]) -> tuple[int, ...]:
        """Turn a leaf into a product or sum of fresh leaves that inherit what is known of it."""
        facts = self.facts[leaf]
        parts = []
        for size in sizes:
            copy = Facts(facts.fixed, facts.coupled, facts.normalised, facts.active)
            parts.append(self._add(size, Form.LEAF, (), copy))
        self.forms[leaf], self.parts[leaf] = form, tuple(parts)
        return self.parts[leaf]

    def _expand(self, axis: int, form: Form) -> list[int]:
        axis = self.find(axis)
        if self.forms[axis] is not form:
            return [axis]
        return [item for part in self.parts[axis] for item in self._expand(part, form)]

    def factors(self, axis: int) -> list[int]:
        """The factors of an axis, products expanded, without ``ONE``."""
        return [] if axis == ONE else self._expand(axis, Form.PRODUCT)

    def segments(self, axis: int) -> list[int]:
        """The summands of an axis, sums expanded."""
        return self._expand(axis, Form.SUM)

    def _divide(self, axis: int, outer: int) -> list[int] | None:
        """Write an axis as (``outer``, rest), or None where its form does not allow it."""
        size, form = self.sizes[axis], self.forms[axis]
        if size % outer:
            return None
        if form is Form.LEAF:
            return list(self._refine(axis, Form.PRODUCT, (outer, size // outer)))
        if form is Form.SUM:
            # q, k and v biases concatenated, then viewed as 3 x heads x width: equal segments are one axis, repeated.
            segments = self.segments(axis)
            if len(segments) == outer and len({self.sizes[segment] for segment in segments}) == 1:
                for segment in segments[1:]:
                    self.unify(segments[0], segment)
                return [self.new(outer, "repeated segments"), self.find(segments[0])]
        return None

    def unify(self, first: int, second: int) -> None:
        """Make two axes keep the same indices. Axes whose forms cannot be matched are frozen, never guessed."""
        first, second = self.find(first), self.find(second)
        if first == second or self.sizes[first] == self.sizes[second] == 1:
            return
        if self.sizes[first] != self.sizes[second]:
            raise AssertionError(f"axes of {self.sizes[first]} and {self.sizes[second]} indices cannot be one")
        if self.forms[first] is not Form.LEAF:
            first, second = second, first
        if self.forms[first] is Form.LEAF:
            facts = self.facts[first]
            self._parents[first] = second
            for leaf in self.leaves(second):
                self.facts[leaf].absorb(facts)
            return
        if self._match(first, second):
            self._parents[self.find(first)] = self.find(second)
        else:
            self.freeze(first, "its indices are laid out in two ways that cannot be cut together")
            self.freeze(second, "its indices are laid out in two ways that cannot be cut together")

    def _match(self, first: int, second: int) -> bool:
        forms = {self.forms[first], self.forms[second]}
        if forms == {Form.SUM}:
            return self._match_segments(self.segments(first), self.segments(second))
        if forms == {Form.PRODUCT}:
            return self._match_factors(self.factors(first), self.factors(second))
        product, sum_ = (first, second) if self.forms[first] is Form.PRODUCT else (second, first)
        outer, *inner = self.factors(product)
        segments = self.segments(sum_)
        widths = {self.sizes[segment] for segment in segments}
        if len(segments) != self.sizes[outer] or len(widths) != 1:
            return False
        self.freeze(outer, "repeated segments")
        rest = self.product(inner)
        for segment in segments:
            self.unify(rest, segment)
        return True

    def _match_factors(self, first: list[int], second: list[int]) -> bool:
        while first and second:
            a, b = self.find(first[0]), self.find(second[0])
            if Form.PRODUCT in (self.forms[a], self.forms[b]) and self.sizes[a] != self.sizes[b]:  # refined meanwhile
                first, second = [*self.factors(a), *first[1:]], [*self.factors(b), *second[1:]]
                continue
            if self.sizes[a] == self.sizes[b]:
                self.unify(a, b)
                first, second = first[1:], second[1:]
                continue
            if self.sizes[a] > self.sizes[b]:
                split = self._divide(a, self.sizes[b])
                first = [*(split or []), *first[1:]]
            else:
                split = self._divide(b, self.sizes[a])
                second = [*(split or []), *second[1:]]
            if split is None:
                return False
        return not first and not second

    def _match_segments(self, first: list[int], second: list[int]) -> bool:
        while first and second:
            a, b = self.find(first[0]), self.find(second[0])
            sizes = self.sizes[a], self.sizes[b]
            if Form.SUM in (self.forms[a], self.forms[b]) and sizes[0] != sizes[1]:  # refined meanwhile
                first, second = [*self.segments(a), *first[1:]], [*self.segments(b), *second[1:]]
                continue
            if sizes[0] == sizes[1]:
                self.unify(a, b)
                first, second = first[1:], second[1:]
                continue
            larger = a if sizes[0] > sizes[1] else b
            if self.forms[larger] is not Form.LEAF:
                return False
            split = self._refine(larger, Form.SUM, (min(sizes), max(sizes) - min(sizes)))
            first = [*split, *first[1:]] if larger == a else first
            second = [*split, *second[1:]] if larger == b else second
        return not first and not second

    def reshape(self, axes: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """The axes of a row-major reshape of a tensor with ``axes`` to ``sizes`` (same number of elements)."""
        result: list[int] = []
        for block, shape in _blocks([self.sizes[axis] for axis in axes], sizes):
            result += self._reshape_block([axes[place] for place in block], shape)
        return result

    def _reshape_block(self, axes: Sequence[int], sizes: Sequence[int]) -> list[int]:
        pending = [factor for axis in axes for factor in self.factors(axis)]
        result = []
        for size in sizes:
            taken = self._take(pending, size)
            if taken is None:
                # The boundary falls inside something that cannot be divided: nothing in this block may be cut.
                reason = "it is reshaped across its own boundaries"
                for axis in axes:
                    self.freeze(axis, reason)
                return [self.new(size, reason) for size in sizes]
            result.append(self.product(taken))
        return result

    def _take(self, pending: list[int], size: int) -> list[int] | None:
        """Take from the front of ``pending`` the factors whose product is ``size``."""
        taken: list[int] = []
        missing = size
        while missing > 1:
            if not pending:
                return None
            factor = self.find(pending.pop(0))
            if self.forms[factor] is Form.PRODUCT:  # refined while we were at it
                pending[:0] = self.factors(factor)
                continue
            if missing % self.sizes[factor] == 0:
                taken.append(factor)
                missing //= self.sizes[factor]
                continue
            split = self._divide(factor, missing) if self.sizes[factor] > missing else None
            if split is None:
                return None
            taken.append(split[0])
            pending[:0] = split[1:]
            missing = 1
        return taken

    def slice(self, axis: int, start: int, stop: int) -> int | None:
        """The axis of the indices ``start`` to ``stop``, or None where they are not whole segments of it."""
        if (start, stop) == (0, self.size(axis)):
            return axis
        found, position = [], 0
        for segment in self.segments(axis):
            low, high = max(start - position, 0), min(stop - position, self.sizes[segment])
            if low < high:
                piece = self._piece(segment, low, high)
                if piece is None:
                    return None
                found.append(piece)
            position += self.sizes[segment]
        return self.sum(found) if found else None

    def _piece(self, segment: int, low: int, high: int) -> int | None:
        size = self.sizes[segment]
        if (low, high) == (0, size):
            return segment
        if self.forms[segment] is Form.PRODUCT:
            outer, *inner = self.factors(segment)
            width = prod(self.sizes[axis] for axis in inner)
            if low % width or high % width:
                return None
            part = self._piece(self.find(outer), low // width, high // width)
            return None if part is None else self.product([part, *inner])
        if self.forms[segment] is Form.SUM:
            return self.slice(segment, low, high)
        cuts = [(0, low), (low, high), (high, size)]
        parts = self._refine(segment, Form.SUM, [b - a for a, b in cuts if b > a])
        return parts[1] if low else parts[0]


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions (places before, sizes after) that hold the same number of elements."""
    blocks: list[tuple[list[int], list[int]]] = []
    place = 0
    places: list[int] = []
    sizes: list[int] = []
    for size in after:
        sizes.append(size)
        while prod(before[p] for p in places) < prod(sizes) and place < len(before):
            places.append(place)
            place += 1
        if prod(before[p] for p in places) == prod(sizes):
            blocks.append((places, sizes))
            places, sizes = [], []
    return [*blocks, (places, sizes)] if sizes else blocks
