"""Numbers and lists as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MINUS, NOTHING = "\u2212", "\u2013"
"""The sign, and the dash in a table's cell for which there is no number."""


SOME = 8
"""The most names of a list that are told."""


def some_names(names: Sequence[str]) -> str:
    """Names with commas between them; of many, the first and how many more there are."""
    text = ", ".join(names[:SOME])
    return text if len(names) <= SOME else f"{text} and {len(names) - SOME} more"


def count(value: float) -> str:
    """A count: 1.24 M."""
    for scale, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * scale:  # 999,600 is 1 M, not 1000 k
            return f"{value / scale:.3g}{name}"
    return f"{value:.0f}"


def byte_count(value: float) -> str:
    """Bytes: 4.62 MB."""
    return f"{count(value)}B" if value >= 999.5 else f"{value:.0f} B"


def percent(value: float) -> str:
    """A share: 76.6%."""
    return f"{value:.1%}"


def round_percent(value: float) -> str:
    """A share without decimals: 77%; what is there is never 0%, and what is not all is never 100%."""
    if 0 < value < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= value < 1 else f"{value:.0%}"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign, the true minus: +1.6."""
    rounded = round(100 * value, 1)
    return f"{rounded:+.1f}".replace("-", MINUS) if rounded else "0.0"


def milliseconds(value: float) -> str:
    """A time of one image: 3.21 ms."""
    return f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"


def seconds(value: float) -> str:
    """A time of a stage: 0.04 s, 4.2 s, 3 min 20 s."""
    if value < 0.995:
        return f"{value:.2f} s"
    if value < 99.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def ratio(value: float) -> str:
    """A keep ratio as it was asked for: 10%, 12.5%."""
    return f"{100 * value:.4g}%"


def plural(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: 1 class, 1,200 images."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def setting(value: Any) -> str:
    """A value of a plan: yes and no, none, numbers as short as they are exact."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
