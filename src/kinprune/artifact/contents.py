"""What an artifact consists of, and the checks that hold before it is written and after it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar, get_args

from torch import nn

from kinprune.backbones import BackboneSpec
from kinprune.errors import ArtifactError
from kinprune.preprocessing import Preprocessing
from kinprune.units.space import Kind
from kinprune.units.surgery import Attribute

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Artifact:
    """A pruned model and all that is known of it: what ``save`` takes and ``load`` gives.

    For each group in forward order, ``kept`` has the kept units' ascending indices in the whole model's unit space,
    ``group_sizes`` its number of units there and ``kinds`` what they are. ``attributes`` are those of the modules that
    differ from the whole model's, as ``units.attributes_of`` gives them. ``backbone_fingerprint`` and
    ``space_fingerprint`` say which backbone and unit space the model was cut from. ``metrics`` and ``provenance``
    hold JSON's own types.
    """

    model: nn.Module
    spec: BackboneSpec
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    kept: Mapping[str, list[int]]
    group_sizes: Mapping[str, int]
    kinds: Mapping[str, Kind]
    backbone_fingerprint: str
    space_fingerprint: str
    attributes: Mapping[str, Mapping[str, Attribute]]
    seed: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def head(self) -> str:
        """Dotted name of the classifier."""
        return self.spec.head


def require(condition: bool, problem: str) -> None:
    """Raise ArtifactError with ``problem`` unless ``condition`` holds."""
    if not condition:
        raise ArtifactError(problem)


def typed(value: Any, kind: type[T], what: str) -> T:
    """``value``, if it is of exactly this type (a bool is no int); ArtifactError otherwise."""
    require(type(value) is kind, f"{what} is of type {type(value).__name__}, expected {kind.__name__}")
    return value  # type: ignore[no-any-return]


def check_contents(artifact: Artifact) -> None:
    """Raise ArtifactError where classes, logits and kept units contradict each other."""
    classes, count = artifact.classes, artifact.spec.num_classes
    require(len(classes) == count, f"there are {len(classes)} classes, but the head makes {count} logits")
    require(all(isinstance(name, str) and name for name in classes), "a class has no name")
    require(len(set(classes)) == len(classes), "two classes have the same name")
    names = set(artifact.kept)
    require(bool(names), "no group of units is listed")
    require(names == set(artifact.group_sizes) == set(artifact.kinds), "kept, group_sizes and kinds name other groups")
    for name, kept in artifact.kept.items():
        size, kind = artifact.group_sizes[name], artifact.kinds[name]
        require(kind in get_args(Kind), f"the units of {name!r} are of the unknown kind {kind!r}")
        require(bool(kept), f"group {name!r} keeps no unit, expected at least one")
        require(all(type(unit) is int for unit in kept), f"the kept units of {name!r} are not all whole numbers")
        require(all(a < b for a, b in pairwise(kept)), f"the kept units of {name!r} are not ascending")
        found = f"keeps units {kept[0]} to {kept[-1]}"
        require(kept[0] >= 0 and kept[-1] < size, f"group {name!r} {found}, expected some of 0 to {size - 1}")
