"""Class names: checked, chosen among, and corrected when mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from kinprune.errors import TaskError


def suggest(name: str, known: Sequence[str]) -> str:
    """Return ``did you mean ...?`` with the known names nearest to ``name``, or what there is to choose from."""
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(by_lower[other]) for other in near)}?"
    return f"known are {listed(known)}"


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return the names quoted and joined, the first ``most`` of them and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def check_unique(names: Sequence[str], source: str) -> None:
    """Raise TaskError if a name occurs twice."""
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise TaskError(f"{source}: class {listed(twice)} is named more than once; give each class a name of its own")


def choose_classes(known: Sequence[str], wanted: Sequence[str] | str | None, source: str) -> tuple[str, ...]:
    """Return the wanted classes in the order wanted, all known ones for ``None``.

    ``wanted`` is a list of names, or one string of names joined by commas. Raises TaskError for a name that is
    unknown or repeated, and for fewer than two classes.
    """
    check_unique(known, source)
    if wanted is None:
        chosen = tuple(known)
    else:
        names = [name.strip() for name in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
        for name in names:
            if not isinstance(name, str):
                raise TaskError(f"classes={wanted!r}: {name!r} is not a class name; name classes as text")
            if name not in known:
                raise TaskError(f"{source}: there is no class {name!r}; {suggest(name, known)}")
        check_unique(names, "classes")
        chosen = tuple(names)
    if len(chosen) < 2:
        raise TaskError(
            f"{source}: {len(chosen)} class{'es' if not chosen else ''} ({listed(chosen) or 'none'}); "
            "a task needs at least two to tell apart"
        )
    return chosen
