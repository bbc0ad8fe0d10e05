"""Numbers as people write them on a command line: refused, with what was written and what is expected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import typer

_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(e[+-]?\d{1,2})?\s*([a-z]*|%)", re.IGNORECASE)
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BYTES = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_LARGEST = 2**62  # what a 64-bit count of a cost can be compared with


def whole(least: int) -> Callable[[Any], int]:
    """A parser of whole numbers of at least ``least``."""

    def parse(text: Any) -> int:
        written = str(text).strip()
        if not re.fullmatch(r"[+-]?\d+", written) or not least <= int(written) <= _LARGEST:
            raise typer.BadParameter(f"'{text}', expected a whole number of at least {least}")
        return int(written)

    return parse


def between(low: float, high: float, example: str) -> Callable[[Any], float]:
    """A parser of numbers above ``low`` and below ``high``."""
    limits = f"above {low:g}" if math.isinf(high) else f"above {low:g} and below {high:g}"

    def parse(text: Any) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low < value < high:
            raise typer.BadParameter(f"'{text}', expected a number {limits}, such as {example}")
        return value

    return parse


def three(text: Any) -> tuple[float, float, float]:
    """Three numbers with commas between them, one a colour."""
    try:
        red, green, blue = (float(part) for part in str(text).split(","))
    except ValueError:
        raise typer.BadParameter(f"'{text}', expected three numbers such as 0.5,0.5,0.5") from None
    return red, green, blue


def share(text: Any) -> float:
    """A share above 0 and at most 1, written ``0.1`` or ``10%``."""
    match = _NUMBER.fullmatch(str(text).strip())
    value = Decimal(match[1] + (match[2] or "")) / (100 if match[3] == "%" else 1) if match else Decimal(0)
    if match is None or match[3] not in ("", "%") or not 0 < value <= 1:
        raise typer.BadParameter(f"'{text}', expected a share above 0 and at most 1, such as 0.1 or 10%")
    return float(value)


@dataclass(frozen=True)
class Limit:
    """An upper limit: an absolute ``amount``, or that many per cent of the whole."""

    amount: Decimal
    percent: bool

    def of(self, whole: int) -> int:
        """The limit in the unit of ``whole``, rounded down."""
        return int(self.amount * whole / 100) if self.percent else int(self.amount)


def limit(unit: Literal["count", "bytes"]) -> Callable[[Any], Limit]:
    """A parser of limits: ``1500000``, ``1.5M``, ``8MB``, ``4MiB`` or ``30%``."""
    scales = _BYTES if unit == "bytes" else _COUNTS
    example = "4000000, 4MB, 512KiB or 20%" if unit == "bytes" else "1500000, 1.5M or 30%"

    def parse(text: Any) -> Limit:
        match = _NUMBER.fullmatch(str(text).strip())
        scale = None if match is None else 1 if match[3] == "%" else scales.get(match[3].lower())
        amount = Decimal(0) if match is None or scale is None else Decimal(match[1] + (match[2] or "")) * scale
        percent = match is not None and match[3] == "%"
        if not (0 if percent else 1) <= amount <= _LARGEST or amount == 0:
            raise typer.BadParameter(f"'{text}', expected a number above 0 such as {example}")
        return Limit(amount, percent)

    return parse


_TIMES = {"": Decimal(1), "ms": Decimal(1), "s": Decimal(1000), "us": Decimal("0.001")}


def time(text: Any) -> float:
    """A time in milliseconds, written ``5ms``, ``5``, ``0.005s`` or ``800us``."""
    match = _NUMBER.fullmatch(str(text).strip())
    scale = None if match is None else _TIMES.get(match[3].lower())
    value = Decimal(0) if match is None or scale is None else Decimal(match[1] + (match[2] or "")) * scale
    if value <= 0:
        raise typer.BadParameter(f"'{text}', expected a time above 0 such as 5ms, 0.8ms or 0.01s")
    return float(value)


def byte_size(text: Any) -> int:
    """A parser of absolute sizes in bytes: ``200000000``, ``200MB`` or ``190MiB``; shares have nothing to be of."""
    found = limit("bytes")(text)
    if found.percent or int(found.amount) < 1:
        raise typer.BadParameter(f"'{text}', expected a number of bytes above 0 such as 200MB or 190MiB")
    return int(found.amount)


def word(text: str) -> Any:
    """A word of a fixed list, which the library checks: as what the library takes, for the type checker."""
    return text
