"""Units: the smallest things that are removed whole, what cutting them does to a model, and what they cost."""

from kinprune.units.costs import CostModel, Costs
from kinprune.units.discovery import find_units
from kinprune.units.space import Group, Mask, Part, Shortcut, UnitSpace, Whole
from kinprune.units.surgery import attributes_of, extract, set_attributes

__all__ = [
    "CostModel",
    "Costs",
    "Group",
    "Mask",
    "Part",
    "Shortcut",
    "UnitSpace",
    "Whole",
    "attributes_of",
    "extract",
    "find_units",
    "set_attributes",
]
