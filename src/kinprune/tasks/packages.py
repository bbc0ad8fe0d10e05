"""Packages that only some sources need."""

from __future__ import annotations

import importlib
from types import ModuleType

from kinprune.errors import TaskError


def require(module: str, purpose: str) -> ModuleType:
    """Import ``module``; raises TaskError saying what to install where its package is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise TaskError(f"{purpose} needs the package {package!r}, which is not here: pip install {package}") from error
