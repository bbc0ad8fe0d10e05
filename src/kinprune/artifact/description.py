"""``kinprune.json``: what an artifact says of itself besides its tensors, written so that any change is seen."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from kinprune.artifact.contents import Artifact, check_contents, require, typed
from kinprune.backbones import BackboneSpec, build_architecture
from kinprune.backbones.checkpoint import Hints
from kinprune.backbones.inputs import resolve_preprocessing
from kinprune.errors import ArtifactError
from kinprune.preprocessing import Preprocessing
from kinprune.units.surgery import Attribute, set_attributes

FORMAT = 1
"""The version of the format that this library writes, and the newest it reads."""

GET_AGAIN = "get the artifact again from where it was made"

_KEYS = frozenset(
    {
        "aliases",
        "attributes",
        "classes",
        "digest",
        "fingerprints",
        "format",
        "groups",
        "metrics",
        "preprocessing",
        "provenance",
        "seed",
        "spec",
        "tensors",
        "versions",
    }
)


def describe(artifact: Artifact, aliases: Mapping[str, str], weights: bytes) -> str:
    """The text of ``kinprune.json`` for an artifact and the bytes of its tensors. Raises ArtifactError."""
    check_contents(artifact)
    content: dict[str, Any] = {
        "format": FORMAT,
        "versions": {name: installed(name) for name in ("kinprune", "timm", "torch")}
        | {"python": platform.python_version()},
        "tensors": {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
        "aliases": dict(aliases),
        "spec": artifact.spec.to_json(),
        "preprocessing": artifact.preprocessing.to_json(),
        "classes": artifact.classes,
        "groups": [
            {"name": name, "kind": artifact.kinds[name], "size": artifact.group_sizes[name], "kept": kept}
            for name, kept in artifact.kept.items()
        ],
        "fingerprints": {"backbone": artifact.backbone_fingerprint, "units": artifact.space_fingerprint},
        "attributes": {module: dict(values) for module, values in artifact.attributes.items()},
        "metrics": dict(artifact.metrics),
        "seed": artifact.seed,
        "provenance": dict(artifact.provenance),
    }
    for key, value in content.items():
        try:
            content[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(f"its {key} are no JSON ({error}), expected texts, finite numbers, lists") from error
    return render(content | {"digest": digest(content)})


def installed(package: str) -> str:
    """The version of an installed package; ``unknown`` where it runs from its sources."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def read_description(path: Path) -> dict[str, Any]:
    """The content of a ``kinprune.json`` that is just as it was written. Raises ArtifactError otherwise."""
    try:
        raw = path.read_bytes()
        content: Any = json.loads(raw, parse_constant=_refuse)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): {GET_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged, it is no JSON ({error}): {GET_AGAIN}") from error
    number = content.get("format") if isinstance(content, dict) else None
    if type(number) is not int or number < 1:
        raise ArtifactError(f"{path} describes no artifact, its format is {number!r}: give an artifact's directory")
    if number > FORMAT:
        raise ArtifactError(
            f"{path} has format {number}, here up to {FORMAT} is read: it was written by a newer Kinprune, upgrade"
        )
    if set(content) != _KEYS:
        differing = ", ".join(sorted(map(repr, _KEYS.symmetric_difference(content)))[:3])
        raise ArtifactError(f"{path} has unknown keys or lacks some ({differing}): {GET_AGAIN}")
    # The text too: no byte may change unseen, a key given twice included.
    if content["digest"] != digest(content) or render(content).encode() != raw:
        raise ArtifactError(f"{path} was altered after it was written: {GET_AGAIN}")
    return dict(content)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def rebuild(content: Mapping[str, Any]) -> Artifact:
    """The artifact that a description tells of; its model has the right attributes, but no tensors yet.

    Raises:
        ArtifactError: the description contradicts itself.
        BackboneError: the architecture cannot be built.
    """
    groups = [_group(item) for item in typed(content["groups"], list, "groups")]
    sizes = {group["name"]: group["size"] for group in groups}
    require(len(sizes) == len(groups), "two groups have the same name")
    typed(content["versions"], dict, "versions")
    prints = typed(content["fingerprints"], dict, "fingerprints")
    require(set(prints) == {"backbone", "units"}, "fingerprints are not exactly those of backbone and units")
    artifact = Artifact(
        nn.Module(),
        BackboneSpec.from_json(content["spec"]),
        _preprocessing(content["preprocessing"]),
        tuple(typed(content["classes"], list, "classes")),
        kept={group["name"]: group["kept"] for group in groups},
        group_sizes=sizes,
        kinds={group["name"]: group["kind"] for group in groups},
        backbone_fingerprint=typed(prints["backbone"], str, "the backbone's fingerprint"),
        space_fingerprint=typed(prints["units"], str, "the unit space's fingerprint"),
        attributes={},
        seed=typed(content["seed"], int, "seed"),
        metrics=typed(content["metrics"], dict, "metrics"),
        provenance=typed(content["provenance"], dict, "provenance"),
    )
    check_contents(artifact)  # before a factory's code runs
    model = build_architecture(artifact.spec)
    attributes = _attributes(content["attributes"], model)
    set_attributes(model, attributes)
    return replace(artifact, model=model, attributes=attributes)


def _group(data: Any) -> dict[str, Any]:
    group: dict[str, Any] = typed(data, dict, "a group")
    require(set(group) == {"name", "kind", "size", "kept"}, "a group has not exactly name, kind, size and kept")
    for key, kind in (("name", str), ("kind", str), ("size", int), ("kept", list)):
        typed(group[key], kind, f"the {key} of a group")
    return group


def _preprocessing(data: Any) -> Preprocessing:
    given, expected = typed(data, dict, "preprocessing"), set(Preprocessing().to_json())
    require(set(given) == expected, f"preprocessing has the keys {sorted(given)}, expected {sorted(expected)}")
    require(None not in given.values(), "a value of preprocessing is missing")
    return resolve_preprocessing({}, Hints(), **given)


def _attributes(data: Any, model: nn.Module) -> dict[str, dict[str, Attribute]]:
    """Only whole numbers that the modules have already are set, and only to smaller ones: a cut does nothing else."""
    modules = dict(model.named_modules())
    result: dict[str, dict[str, Attribute]] = {}
    for name, values in typed(data, dict, "attributes").items():
        require(name in modules, f"the architecture has no module {name!r} to set attributes of")
        for attribute, value in typed(values, dict, f"the attributes of {name!r}").items():
            new: Any = tuple(value) if isinstance(value, list) else value
            old = vars(modules[name]).get(attribute)
            require(_is_cut(new, old), f"{attribute!r} of {name!r} is to be {value!r}, which is no part of {old!r}")
            result.setdefault(name, {})[attribute] = new
    return result


def _is_cut(new: Any, old: Any) -> bool:
    if isinstance(new, tuple) and isinstance(old, tuple):
        return len(new) == len(old) and all(map(_is_cut, new, old))
    return type(new) is int and type(old) is int and 0 < new <= old


def digest(content: Mapping[str, Any]) -> str:
    """sha256 of a description's text without its digest."""
    return hashlib.sha256(render({key: content[key] for key in content if key != "digest"}).encode()).hexdigest()


def render(content: Mapping[str, Any]) -> str:
    """A description's text: the same for the same content. Raises ArtifactError if it is nested too deeply."""
    try:
        return _rendered(content, "") + "\n"
    except RecursionError as error:
        raise ArtifactError(
            "its description is nested too deeply, expected a few levels of lists and objects"
        ) from error


def _rendered(value: Any, indent: str) -> str:
    """JSON in ASCII with sorted keys, where lists of plain values stay on one line."""
    inner = f"{indent}  "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(key)}: {_rendered(value[key], inner)}" for key in sorted(value)]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(inner + _rendered(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value)
