"""Protocols and methods: small files that say what is run, read and checked before anything is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STAGES = ("validation", "test")


@dataclass(frozen=True)
class BankSource:
    """The bank of a protocol: its backbone, and the source tasks it is built from if it is not there yet.

    ``model``, ``weights`` (a file's name) and ``image_size`` are as ``load_backbone`` takes them; the ``tasks`` source
    tasks have ``classes`` classes of ``data`` with ``shots`` training images each, and none of those ``left_out``. One
    more has all the other classes and is fine-tuned for ``broad_steps``; with 0 there is none. All are pruned to the
    share ``keep`` of their units, with ``stream`` those of the residual stream too.
    """

    file: str
    model: str
    weights: str
    image_size: int
    data: str
    label_column: str | None
    tasks: int
    classes: int
    shots: int
    broad_steps: int
    left_out: tuple[str, ...]
    keep: float = 0.1
    stream: bool = False


@dataclass(frozen=True)
class Targets:
    """The target tasks: ``classes`` classes of one of the data sets ``data``, with ``shots`` training images each, in
    turn of each data set.

    With ``unseen`` they are drawn from classes that no source task has, ``validation_classes`` of them for the
    validation tasks and the others for the test tasks. ``seed`` draws them.
    """

    data: tuple[str, ...]
    label_column: str | None
    classes: int
    shots: int | None
    unseen: bool
    validation_classes: int
    validation: int
    test: int
    seed: int


@dataclass(frozen=True)
class Part:
    """Runs: every method at every keep ratio, trained for each number of steps from the same start.

    ``tasks`` limits it to the first of the target tasks, ``shots`` and ``sources`` (how many narrow records of the bank
    may be used; None for all) are what else is varied.
    """

    stage: str
    methods: tuple[str, ...]
    keep: tuple[float, ...] = (0.1,)
    steps: tuple[int, ...] = (15, 60)
    tasks: int | None = None
    shots: tuple[int | None, ...] = (None,)
    sources: tuple[int | None, ...] = (None,)


@dataclass(frozen=True)
class Protocol:
    """What is run and on what; ``parts`` in their order, the most telling first."""

    name: str
    bank: BankSource
    targets: Targets
    parts: tuple[Part, ...]
    methods: Mapping[str, Mapping[str, Any]] = field(hash=False)


def read_protocol(name: str) -> Protocol:
    """A protocol by its file's name without ``.json``, or by a path; ValueError where it says what nobody knows."""
    path = Path(name) if name.endswith(".json") else HERE / "protocols" / f"{name}.json"
    if not path.is_file():
        known = sorted(one.stem for one in (HERE / "protocols").glob("*.json"))
        raise ValueError(f"there is no protocol {name!r}, expected one of {', '.join(known)}, or a path")
    content = json.loads(path.read_text())
    methods = json.loads((HERE / "methods.json").read_text())
    bank = dict(content["bank"])
    bank["left_out"] = tuple(bank.get("left_out", ()))
    parts = tuple(
        Part(**{key: tuple(value) if isinstance(value, list) else value for key, value in part.items()})
        for part in content["parts"]
    )
    for part in parts:
        if part.stage not in STAGES:
            raise ValueError(f"{path.name}: there is no stage {part.stage!r}, expected {' or '.join(STAGES)}")
        unknown = [method for method in part.methods if method not in methods]
        if unknown:
            raise ValueError(f"{path.name}: methods.json has no method {unknown[0]!r}")
    targets = dict(content["targets"])
    targets["data"] = (targets["data"],) if isinstance(targets["data"], str) else tuple(targets["data"])
    return Protocol(path.stem, BankSource(**bank), Targets(**targets), parts, methods)


def with_sources(protocol: Protocol, tasks: int) -> Protocol:
    """The protocol with a bank of another number of narrow source tasks; ValueError where that is none."""
    if tasks < 1:
        raise ValueError(f"--tasks is {tasks}, expected at least 1")
    return replace(protocol, bank=replace(protocol.bank, tasks=tasks))


def smoke(protocol: Protocol) -> Protocol:
    """The protocol made tiny, to see in minutes that all of it runs: every method once, on one task of a stage.

    Its bank, of a file of its own, has two narrow tasks and a broad one, and hardly anything is trained. What it gives
    says nothing.
    """
    bank = replace(protocol.bank, file=f"smoke-{protocol.bank.file}", tasks=2, shots=8, broad_steps=1)
    targets = replace(protocol.targets, shots=8, validation=1, test=1)
    parts: dict[str, dict[str, None]] = {}
    for part in protocol.parts:
        parts.setdefault(part.stage, {}).update(dict.fromkeys(part.methods))
    tiny = tuple(Part(stage, tuple(methods), steps=(1,)) for stage, methods in parts.items())
    methods = {
        name: {**method, "options": {option: 1 for option in method["options"]}} if "options" in method else method
        for name, method in protocol.methods.items()
    }
    return Protocol(f"smoke-{protocol.name}", bank, targets, tiny, methods)
