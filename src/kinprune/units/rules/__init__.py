"""What each operation does to the axes of its tensors.

A rule takes a ``Call`` and returns the axes of its outputs, unifying the axes that must be cut together on the way.
Whatever has no rule goes to ``unknown``, which freezes everything it touches: a new operation makes fewer units,
never wrong ones.
"""

from kinprune.units.rules import layers, rearrangements
from kinprune.units.rules.registry import RULES, Result, rule, unknown

__all__ = ["RULES", "Result", "layers", "rearrangements", "rule", "unknown"]
