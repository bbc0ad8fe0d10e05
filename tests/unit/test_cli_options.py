"""Numbers as people write them, and numbers as people read them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from kinprune.cli.options import chosen_classes
from kinprune.cli.output import console, show_json
from kinprune.cli.running import begin
from kinprune.cli.values import Limit, between, byte_size, limit, share, whole
from kinprune.errors import BackboneError
from kinprune.quantities import byte_count, count


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1500000", 1_500_000),
        ("1.5M", 1_500_000),
        ("1.5 m", 1_500_000),
        ("2.3M", 2_300_000),
        (".5k", 500),
        ("7.", 7),
        ("1.15k", 1_150),
        ("3G", 3 * 10**9),
        ("3B", 3 * 10**9),
        ("2T", 2 * 10**12),
        ("1e6", 10**6),
        ("1.5E+6", 1_500_000),
        ("25e-1k", 2_500),
        (" 12 ", 12),
    ],
)
def test_counts(text: str, value: int) -> None:
    assert limit("count")(text).of(10) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8MB", 8_000_000),
        ("8mb", 8_000_000),
        ("4MiB", 4 << 20),
        ("512KiB", 512 << 10),
        ("1.5GiB", 3 << 29),
        ("100", 100),
        ("100B", 100),
        ("2k", 2_000),
        ("0.29kB", 290),
    ],
)
def test_bytes(text: str, value: int) -> None:
    assert limit("bytes")(text).of(10) == value


@pytest.mark.parametrize(("text", "value"), [("30%", 299), ("0.5 %", 4), ("100%", 999), ("33.3%", 332), ("250%", 2497)])
def test_shares_of_the_whole_are_rounded_down(text: str, value: int) -> None:
    for unit in ("count", "bytes"):
        assert limit(unit)(text).of(999) == value  # type: ignore[arg-type]


@given(st.integers(1, 10**15))
def test_whole_numbers_are_exact(number: int) -> None:
    assert limit("count")(str(number)).of(1) == number
    assert limit("count")(f"{number // 1000}.{number % 1000:03d}k").of(1) == number


@given(st.text(max_size=12))
def test_any_text_is_a_limit_or_refused(text: str) -> None:
    try:
        parsed = limit("bytes")(text)
    except typer.BadParameter as error:
        assert repr(text)[1:-1] in str(error) or text in str(error)
        assert "expected a number above 0" in str(error)
    else:
        assert isinstance(parsed, Limit) and 0 < parsed.amount <= 2**62


REFUSED: list[tuple[Callable[[Any], Any], str]] = [
    *((limit("count"), text) for text in ("", "0", "-1", "1.5X", "3MB", "1,5M", "nan", "inf", "0%", "1 2", "0x10")),
    *((byte_size, text) for text in ("20%", "0", "0.4", "-1MB", "much")),
    *((limit("bytes"), text) for text in ("8MBit", "1T", "%", "-5%", "9" * 30)),
    *((limit("count"), text) for text in ("0.4", "1e99", "1e-3")),
    *((share, text) for text in ("0", "0%", "101%", "1.01", "-0.5", "1k", "half", "nan", "")),
    *((whole(1), text) for text in ("0", "-3", "1.5", "three", "", "1e3", "9" * 30)),
    *((between(0, 1, "0.2"), text) for text in ("0", "1", "nan", "inf", "-inf", "x", "")),
    *((between(0, math.inf, "0.2"), text) for text in ("inf", "-1")),
]


@pytest.mark.parametrize(("parse", "text"), REFUSED, ids=[text[:8] for _, text in REFUSED])
def test_nonsense_is_refused_and_repeated(parse: Callable[[Any], Any], text: str) -> None:
    with pytest.raises(typer.BadParameter) as error:
        parse(text)
    assert f"'{text}', expected a" in str(error.value)


def test_shares_and_numbers() -> None:
    assert [share(text) for text in ("0.1", "10%", "1", "100 %", ".5", "5e-2")] == [0.1, 0.1, 1, 1, 0.5, 0.05]
    assert whole(0)("0") == 0 and whole(1)(60) == 60 and whole(1)(" +7 ") == 7
    assert between(0, 1, "0.2")("2e-1") == 0.2 and between(0, math.inf, "1")(3) == 3.0


def test_chosen_classes() -> None:
    assert chosen_classes(None) is None
    assert chosen_classes(" cat, dog,,big bird ,") == ["cat", "dog", "big bird"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1_000, "1 k"),
        (1_164, "1.16 k"),
        (999_499, "999 k"),
        (999_500, "1 M"),
        (1_240_000, "1.24 M"),
        (999_999_999, "1 G"),
        (25_600_000, "25.6 M"),
        (3.2e12, "3.2 T"),
    ],
)
def test_counts_for_people(value: float, text: str) -> None:
    assert count(value) == text


def test_bytes_for_people() -> None:
    assert [byte_count(value) for value in (12, 999, 1_000, 4_620_000)] == ["12 B", "999 B", "1 kB", "4.62 MB"]


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("[red]:smile: 1.5[/red]")
    assert capsys.readouterr().out == "[red]:smile: 1.5[/red]\n"


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"a": [1, 2.5, None, "ü"]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, 2.5, None, "ü"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        show_json({"a": math.nan})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "", "meta", "xpu", "cuda:4711"])
def test_devices_that_are_refused(device: str) -> None:
    with pytest.raises(BackboneError, match=f"'{device}'"):
        begin(device, None)
