"""Artifacts: a pruned model on disk, rebuilt without tracing, without pickle and without the original weights.

An artifact is a directory of three files: ``model.safetensors`` (every tensor of the pruned model), ``kinprune.json``
(how to build the architecture, which units were kept, classes, preprocessing, metrics) and ``README.md`` for people.
The JSON file holds the hash of the tensors and of itself, so that any change after saving is seen on load.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor, nn

from kinprune.backbones import BackboneSpec, build_architecture
from kinprune.backbones.checkpoint import Hints
from kinprune.backbones.inputs import resolve_preprocessing
from kinprune.errors import ArtifactError, BackboneError
from kinprune.evaluation import device_of, eval_mode
from kinprune.preprocessing import Preprocessing
from kinprune.units.space import Kind
from kinprune.units.surgery import Attribute, set_attributes

FORMAT = 1
"""The version of the format that this library writes, and the newest it reads."""

TENSORS, DESCRIPTION, README = "model.safetensors", "kinprune.json", "README.md"
_KEYS = frozenset(
    "aliases attributes classes digest fingerprints format groups metrics preprocessing provenance seed spec tensors "
    "versions".split()
)
_AGREEMENT = 1e-3  # of the greatest logit: a wrong attribute is far above, another memory format far below
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


def check_destination(directory: str | Path, *, overwrite: bool = False) -> None:
    """Refuse, with ArtifactError, a directory ``save`` could not write: worth asking before hours of work."""
    target = Path(directory).expanduser()
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ArtifactError(f"{target} cannot be written: {above} is no folder that may be written to; choose another")
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file, expected a directory for the artifact: choose another path")
    names = {path.name for path in target.iterdir()}
    if names and DESCRIPTION not in names:
        raise ArtifactError(f"{target} is not empty and no artifact: choose a new or empty directory")
    if names and not overwrite:
        raise ArtifactError(f"{target} already holds an artifact: choose another directory, or overwrite=True")
    foreign = sorted(names - {TENSORS, DESCRIPTION, README})
    if foreign:  # they would go with the directory
        raise ArtifactError(f"{target} holds more than an artifact ({', '.join(foreign[:3])}): move that elsewhere first")


def save(artifact: Artifact, directory: str | Path, *, overwrite: bool = False) -> Path:
    """Write an artifact and return its directory; parent folders are made.

    The files are completed in a hidden directory beside the target, loaded again from there, compared with the model
    on random images, and only then moved into place: an interrupted save leaves what was there before. With
    ``overwrite`` the new artifact takes an old one's place.

    Raises:
        ArtifactError: the target cannot be written or holds something else, or the artifact contradicts itself.
    """
    check_destination(directory, overwrite=overwrite)
    target = Path(directory).expanduser()
    tensors, aliases = _tensors_to_store(artifact)
    weights = write_tensors(tensors)
    description = _describe(artifact, aliases, weights)
    files = {TENSORS: weights, DESCRIPTION: _render(description).encode(), README: _readme(artifact, target).encode()}
    try:
        place = target.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        with _beside(place, "tmp") as temporary:
            _write(temporary, files)
            _check_answers(artifact, load(temporary).model)
            _put(temporary, place)
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written: {error}; free space, or choose another directory") from error
    return target


def load(directory: str | Path) -> Artifact:
    """Read an artifact: the model in evaluation mode on the CPU, every tensor as it was saved, bit for bit.

    Nothing is traced and no weights but the artifact's own are needed. Where the backbone is a ``module:factory``,
    that code is imported and called: load such artifacts only from where you trust them.

    Raises:
        ArtifactError: something is missing, damaged, altered, contradictory, or written by a newer version.
    """
    place = Path(directory).expanduser()
    if not place.is_dir():
        raise ArtifactError(f"{place} is {'a file' if place.exists() else 'not there'}, {_expected(place)}")
    content = _read_description(place / DESCRIPTION)
    weights = _read_weights(place / TENSORS, content["tensors"])
    try:
        spec = BackboneSpec.from_json(content["spec"])
        preprocessing = _preprocessing(content["preprocessing"])
        model = build_architecture(spec)
    except BackboneError as error:
        raise ArtifactError(f"{place}: the architecture cannot be built: {error}") from error
    try:
        classes = tuple(_typed(name, str, "a class") for name in _typed(content["classes"], list, "classes"))
        groups = [_group(item) for item in _typed(content["groups"], list, "groups")]
        prints = _typed(content["fingerprints"], dict, "fingerprints")
        _require(set(prints) == {"backbone", "units"}, "fingerprints does not hold exactly backbone and units")
        artifact = Artifact(
            model, spec, preprocessing, classes,
            kept={group["name"]: group["kept"] for group in groups},
            group_sizes={group["name"]: group["size"] for group in groups},
            kinds={group["name"]: group["kind"] for group in groups},
            backbone_fingerprint=_typed(prints["backbone"], str, "the backbone's fingerprint"),
            space_fingerprint=_typed(prints["units"], str, "the unit space's fingerprint"),
            attributes=_attributes(content["attributes"], model),
            seed=_typed(content["seed"], int, "seed"),
            metrics=_typed(content["metrics"], dict, "metrics"),
            provenance=_typed(content["provenance"], dict, "provenance"),
        )  # fmt: skip
        _require(len(artifact.kept) == len(groups), "two groups have the same name")
        _check(artifact)
        set_attributes(model, artifact.attributes)
        _assign(model, weights, _typed(content["aliases"], dict, "aliases"))
        _check_shapes(model, spec)
    except ArtifactError as error:
        raise ArtifactError(f"{place} contradicts itself: {error}; get the artifact again") from error
    return artifact


# What an artifact is made of, checked the same way before it is written and after it is read.


def _check(artifact: Artifact) -> None:
    classes, count = artifact.classes, artifact.spec.num_classes
    _require(len(classes) == count, f"there are {len(classes)} classes, but the model's head makes {count} logits")
    _require(all(isinstance(name, str) and name for name in classes), "a class has no name")
    _require(len(set(classes)) == len(classes), "two classes have the same name")
    names = set(artifact.kept)
    _require(bool(names), "no group of units is listed")
    _require(names == set(artifact.group_sizes) == set(artifact.kinds), "kept, group_sizes and kinds differ in groups")
    for name, kept in artifact.kept.items():
        size, kind = artifact.group_sizes[name], artifact.kinds[name]
        _require(kind in get_args(Kind), f"the units of {name} are of the unknown kind {kind!r}")
        _require(bool(kept), f"{name} keeps no unit, expected at least one")
        _require(all(type(unit) is int for unit in kept), f"the kept units of {name} are not all whole numbers")
        _require(all(low < high for low, high in pairwise(kept)), f"the kept units of {name} are not ascending")
        _require(0 <= kept[0] and kept[-1] < size, f"{name} has {size} units, but keeps number {kept[0]} to {kept[-1]}")


def _group(data: Any) -> dict[str, Any]:
    group: dict[str, Any] = _typed(data, dict, "a group")
    _require(set(group) == {"name", "kind", "size", "kept"}, "a group has not exactly name, kind, size and kept")
    for key, kind in (("name", str), ("kind", str), ("size", int), ("kept", list)):
        _typed(group[key], kind, f"the {key} of a group")
    return group


def _attributes(data: Any, model: nn.Module) -> dict[str, dict[str, Attribute]]:
    """Only whole numbers that are there already are set, and only to smaller ones: nothing else is a cut."""
    modules = dict(model.named_modules())
    result: dict[str, dict[str, Attribute]] = {}
    for name, values in _typed(data, dict, "attributes").items():
        _require(name in modules, f"the architecture has no module {name!r} to set attributes of")
        for attribute, value in _typed(values, dict, f"the attributes of {name}").items():
            new = tuple(value) if isinstance(value, list) else value
            old = vars(modules[name]).get(attribute)
            sides = zip(_sides(new), _sides(old), strict=False)
            fits = type(old) is type(new) and len(_sides(new)) == len(_sides(old)) > 0
            fits = fits and all(type(a) is int and type(b) is int and 0 < a <= b for a, b in sides)
            _require(fits, f"the attribute {attribute!r} of {name} is {value!r}, which does not fit {old!r}")
            result.setdefault(name, {})[attribute] = new
    return result


def _sides(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _preprocessing(data: Any) -> Preprocessing:
    given = _typed(data, dict, "preprocessing")
    expected = Preprocessing().to_json()
    if set(given) != set(expected) or None in given.values():
        raise BackboneError(f"the preprocessing has the keys {sorted(given)}, expected values of {sorted(expected)}")
    return resolve_preprocessing({}, Hints(), **given)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ArtifactError(problem)


def _typed(value: Any, kind: type[T], what: str) -> T:
    _require(type(value) is kind, f"{what} is of type {type(value).__name__}, expected {kind.__name__}")
    return value  # type: ignore[no-any-return]


# Tensors.


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every name they have: tied ones come up several times."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _tensors_to_store(artifact: Artifact) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, contiguous on the CPU, and for further names of a tied one the name it is stored under."""
    try:
        architecture = build_architecture(artifact.spec)
    except BackboneError as error:
        raise ArtifactError(f"the artifact's architecture cannot be built: {error}") from error
    expected, persistent = dict(_named_tensors(architecture)), set(architecture.state_dict())
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in _named_tensors(artifact.model):
        value = tensor.detach()
        if name in expected and name not in persistent and torch.equal(value.cpu(), expected[name]):
            continue  # the architecture computes it itself
        identity = (isinstance(tensor, nn.Parameter), value.device, value.data_ptr(), value.shape, value.stride())
        if value.numel() and identity in first:
            aliases[name] = first[identity]
            continue
        first[identity] = name
        stored[name] = value.cpu().contiguous().clone()
    _check_tensors(stored, aliases, expected, persistent)
    return stored, aliases


def _check_tensors(
    stored: Mapping[str, Tensor], aliases: Mapping[str, str], expected: Mapping[str, Tensor], persistent: set[str]
) -> None:
    """Names, types, dimensions and values of tensors against those of the whole model's architecture."""
    needed = {name for name, tensor in expected.items() if isinstance(tensor, nn.Parameter) or name in persistent}
    missing, unknown = sorted(needed - set(stored) - set(aliases)), sorted({*stored, *aliases} - set(expected))
    _require(not missing, f"{len(missing)} tensors of the architecture are missing ({', '.join(missing[:3])})")
    _require(not unknown, f"{len(unknown)} tensors have no place in the architecture ({', '.join(unknown[:3])})")
    for alias, name in aliases.items():
        _require(alias not in stored and name in stored, f"{alias!r} is said to be {name!r}, which is not stored")
    for name in (*stored, *aliases):
        tensor, whole = stored[aliases.get(name, name)], expected[name]
        _require(tensor.dtype == whole.dtype, f"{name!r} is {tensor.dtype}, expected {whole.dtype}")
        fits = tensor.dim() == whole.dim() and all(
            a == b or 0 < a < b for a, b in zip(tensor.shape, whole.shape, strict=True)
        )
        _require(fits, f"{name!r} is {list(tensor.shape)}, which is no part of {list(whole.shape)}")
        finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
        _require(finite, f"{name!r} holds NaN or infinity, expected finite numbers")


def _assign(model: nn.Module, stored: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    expected = dict(_named_tensors(model))
    for alias, name in aliases.items():
        _typed(name, str, f"the alias {alias!r}")
    _check_tensors(stored, aliases, expected, set(model.state_dict()))
    made: dict[str, Tensor] = {}
    for name in (*stored, *aliases):
        whole, source = expected[name], aliases.get(name, name)
        if source not in made:
            parameter = isinstance(whole, nn.Parameter)
            made[source] = nn.Parameter(stored[source], whole.requires_grad) if parameter else stored[source]
        owner, _, attribute = name.rpartition(".")
        same = isinstance(made[source], nn.Parameter) == isinstance(whole, nn.Parameter)
        _require(same, f"{name!r} and {source!r} are not both parameters, or both buffers")
        setattr(model.get_submodule(owner), attribute, made[source])


def _check_shapes(model: nn.Module, spec: BackboneSpec) -> None:
    """Each layer's tensors against what the layer says of itself, so that a wrong cut is seen before it runs."""
    for name, module in model.named_modules():
        weight, expected = module._parameters.get("weight"), _weight_shape(module)
        if weight is not None and expected is not None:
            found = tuple(weight.shape)
            _require(found == expected, f"the weight of {name} is {list(found)}, but the layer takes {list(expected)}")
            bias = module._parameters.get("bias")
            norm = isinstance(module, nn.LayerNorm)
            sides = expected if norm else (getattr(module, "out_channels", expected[0]),)
            _require(bias is None or tuple(bias.shape) == sides, f"the bias of {name} does not fit its weight")
    outputs = len(model.get_parameter(f"{spec.head}.weight"))
    _require(outputs == spec.num_classes, f"the head makes {outputs} logits, expected {spec.num_classes}")


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        outer, inner = module.out_channels, module.in_channels
        if module.transposed:
            outer, inner = inner, outer
        return (outer, inner // module.groups, *module.kernel_size)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return (module.num_features,)
    if isinstance(module, nn.GroupNorm):
        return (module.num_channels,)
    return tuple(module.normalized_shape) if isinstance(module, nn.LayerNorm) else None


@torch.no_grad()
def _check_answers(artifact: Artifact, loaded: nn.Module) -> None:
    """Refuse to store what would answer otherwise than the model: an attribute left out is seen here."""
    images = torch.randn(2, 3, *artifact.preprocessing.image_size, generator=torch.Generator().manual_seed(0))
    try:
        with eval_mode(artifact.model):
            expected = artifact.model(images.to(device_of(artifact.model))).cpu()
        found = loaded(images)
    except RuntimeError as error:
        raise ArtifactError(f"the model cannot be stored: it does not run: {error}; check spec and attributes") from error
    if found.shape != expected.shape or not _agree(found, expected):
        raise ArtifactError(
            "the model cannot be stored: read back, it answers differently; expected a model that the spec, the "
            "attributes and its tensors describe in full: pass the attributes of units.attributes_of"
        )


def _agree(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= _AGREEMENT * expected.abs().max().clamp(min=1))


# Files.


def _describe(artifact: Artifact, aliases: Mapping[str, str], weights: bytes) -> dict[str, Any]:
    _check(artifact)
    content: dict[str, Any] = {
        "format": FORMAT,
        "versions": {name: _version(name) for name in ("kinprune", "timm", "torch")}
        | {"python": platform.python_version()},
        "tensors": {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
        "aliases": aliases,
        "spec": artifact.spec.to_json(),
        "preprocessing": artifact.preprocessing.to_json(),
        "classes": artifact.classes,
        "groups": [
            {"name": name, "kind": artifact.kinds[name], "size": artifact.group_sizes[name], "kept": kept}
            for name, kept in artifact.kept.items()
        ],
        "fingerprints": {"backbone": artifact.backbone_fingerprint, "units": artifact.space_fingerprint},
        "attributes": artifact.attributes,
        "metrics": artifact.metrics,
        "seed": artifact.seed,
        "provenance": artifact.provenance,
    }
    for key, value in content.items():
        try:
            content[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{key} of the artifact is no JSON ({error}): give finite numbers, text and lists") from error
    return content | {"digest": _digest(content)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources
        return "unknown"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_render({key: content[key] for key in content if key != "digest"}).encode()).hexdigest()


def _render(value: Any, indent: str = "") -> str:
    """JSON with sorted keys, where lists of numbers stay on one line: ASCII, the same text for the same content."""
    inner = f"{indent}  "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(key)}: {_render(value[key], inner)}" for key in sorted(value)]
        text = "{\n" + ",\n".join(items) + f"\n{indent}}}"
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        text = "[\n" + ",\n".join(inner + _render(item, inner) for item in value) + f"\n{indent}]"
    else:
        text = json.dumps(value)
    return text if indent else f"{text}\n"
