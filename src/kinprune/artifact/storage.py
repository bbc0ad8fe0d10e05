"""Artifacts on disk: a directory of ``model.safetensors``, ``kinprune.json`` and ``README.md``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor, nn

from kinprune.artifact.contents import Artifact, require, typed
from kinprune.artifact.description import GET_AGAIN, describe, installed, read_description, rebuild
from kinprune.artifact.files import directory_beside, moved_aside, replace_directory, settle
from kinprune.artifact.tensors import assign, collect
from kinprune.backbones import build_architecture
from kinprune.errors import ArtifactError, BackboneError
from kinprune.evaluation import device_of, eval_mode

TENSORS, DESCRIPTION, README = "model.safetensors", "kinprune.json", "README.md"
EXPORTED, REPORT, RECORD = "model.onnx", "report.html", "record.safetensors"
PROGRAMS = ("model.pte", "model.pt2")
"""What others put beside the model; it is of the old model, so it goes when that is overwritten."""
AGREEMENT = 1e-3
"""Of the greatest logit. What is wrong is far above; another memory format or device is far below."""
_AS_MADE = "give the model that extract made, its backbone's spec and the attributes of attributes_of"


def check_destination(directory: str | Path, *, overwrite: bool = False) -> None:
    """Refuse, with ArtifactError, a directory that ``save`` could not write: to be asked before long work."""
    target = Path(directory).expanduser()
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ArtifactError(f"{target} cannot be made: {above} is no folder one may write to; choose another directory")
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file, expected a directory for the artifact: choose another path")
    names = {path.name for path in target.iterdir()}
    if names and DESCRIPTION not in names:
        raise ArtifactError(f"{target} has files in it and is no artifact: choose a new or empty directory")
    if names and not overwrite:
        raise ArtifactError(f"{target} already holds an artifact: choose another directory, or --overwrite it")
    others = sorted(names - {TENSORS, DESCRIPTION, README, EXPORTED, REPORT, RECORD, *PROGRAMS})
    if others:  # they would go with the directory
        raise ArtifactError(
            f"{target} holds more than an artifact ({', '.join(others[:3])}): move that elsewhere first"
        )


def save(artifact: Artifact, directory: str | Path, *, overwrite: bool = False) -> Path:
    """Write an artifact and return its directory; missing parent folders are made.

    The files are completed in a hidden directory beside the target, loaded again from there, compared with the model
    on random images, and only then moved into place: an interrupted save leaves what was there before. With
    ``overwrite`` the new artifact takes the place of an old one.

    Raises:
        ArtifactError: the target cannot be written or holds something else, or the artifact contradicts itself.
    """
    check_destination(directory, overwrite=overwrite)
    place = Path(directory).expanduser().resolve()
    try:
        tensors, aliases = collect(artifact.model, build_architecture(artifact.spec))
        weights = write_tensors(tensors)
        description = describe(artifact, aliases, weights)
        place.parent.mkdir(parents=True, exist_ok=True)
        with directory_beside(place, "tmp") as temporary:
            (temporary / TENSORS).write_bytes(weights)
            (temporary / DESCRIPTION).write_text(description, encoding="utf-8", newline="\n")
            readme = _readme(artifact, place.name)
            (temporary / README).write_text(readme, encoding="utf-8", errors="backslashreplace", newline="\n")
            _check_answers(artifact, load(temporary).model)
            settle(temporary)
            replace_directory(temporary, place)
    except (ArtifactError, BackboneError) as error:
        problem = error.__cause__ if isinstance(error.__cause__, ArtifactError) else error
        raise ArtifactError(f"the artifact for {directory} is not written: {problem}; {_AS_MADE}") from error
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be written ({error}): free space, or use another directory") from error
    return Path(directory).expanduser()


def load(directory: str | Path) -> Artifact:
    """Read an artifact: its model in evaluation mode on the CPU, every tensor bit for bit as it was saved.

    Nothing is traced, and no weights but the artifact's own are read. Where the backbone is a ``module:factory`` of
    someone's own code, that code is imported and called: load such an artifact only where you trust its origin.

    Raises:
        ArtifactError: something is missing, damaged, altered, contradictory, or written by a newer version.
    """
    place = Path(directory).expanduser()
    if not place.is_dir():
        raise ArtifactError(f"{place} is {'a file' if place.exists() else 'not there'}, {_instead(place)}")
    content = read_description(place / DESCRIPTION)
    stored = _read_tensors(place / TENSORS, content["tensors"])
    try:
        artifact = rebuild(content)
        aliases = typed(content["aliases"], dict, "aliases")
        require(all(isinstance(name, str) for name in aliases.values()), "an alias is no name of a tensor")
        assign(artifact.model, stored, aliases)
        outputs = len(artifact.model.get_parameter(f"{artifact.head}.weight"))
        require(
            outputs == len(artifact.classes), f"{len(artifact.classes)} classes, but the head makes {outputs} logits"
        )
    except (ArtifactError, BackboneError) as error:
        raise ArtifactError(f"{place} cannot be used: {error}; {_advice(content['versions'])}") from error
    artifact.model.eval()
    return artifact


def _instead(place: Path) -> str:
    aside = moved_aside(place)
    if aside:
        return f"but overwriting it was interrupted: the artifact of before is {aside[-1]}, move it back"
    return f"expected an artifact's directory with {DESCRIPTION} and {TENSORS}: give the one that save wrote"


def _advice(versions: Any) -> str:
    made_with = versions.get("timm") if isinstance(versions, dict) else None
    if made_with != installed("timm"):
        return f"it was made with timm {made_with}, here is {installed('timm')}: install that one, or make it again"
    return GET_AGAIN


def _read_tensors(path: Path, expected: Any) -> dict[str, Tensor]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): {GET_AGAIN}") from error
    if not isinstance(expected, dict) or set(expected) != {"bytes", "sha256"}:
        raise ArtifactError(f"{path.with_name(DESCRIPTION)} has no size and hash of {path.name}: {GET_AGAIN}")
    if len(raw) != expected["bytes"]:
        raise ArtifactError(f"{path} has {len(raw)} bytes, expected {expected['bytes']}: {GET_AGAIN}")
    if hashlib.sha256(raw).hexdigest() != expected["sha256"]:
        raise ArtifactError(f"{path} is damaged or was altered, its hash is another: {GET_AGAIN}")
    try:
        return read_tensors(raw)
    except (SafetensorError, KeyError) as error:  # KeyError: a type of numbers that PyTorch has not
        raise ArtifactError(f"{path} is no safetensors file ({error}): {GET_AGAIN}") from error


@torch.no_grad()
def _check_answers(artifact: Artifact, loaded: nn.Module) -> None:
    """Refuse to store what answers otherwise when read back: only so is an attribute seen that was left out."""
    images = torch.randn(2, 3, *artifact.preprocessing.image_size, generator=torch.Generator().manual_seed(0))
    try:
        with eval_mode(artifact.model):
            expected = artifact.model(images.to(device_of(artifact.model))).cpu()
        found = loaded(images)
    except RuntimeError as error:
        raise ArtifactError(f"the model does not run ({error})") from error
    require(bool(torch.isfinite(expected).all()), "the model answers with NaN or infinity")
    same = found.shape == expected.shape and (found - expected).abs().max() <= AGREEMENT * expected.abs().max()
    require(bool(same), "read back, the model answers differently")


def _readme(artifact: Artifact, name: str) -> str:
    kept, units = sum(map(len, artifact.kept.values())), sum(artifact.group_sizes.values())
    height, width = artifact.preprocessing.image_size
    metrics = [f"| {key} | {value} |" for key, value in _plain("", artifact.metrics)]
    table = ["", "| metric | value |", "| --- | --- |", *metrics] if metrics else []
    lines = [
        f"# {name}",
        "",
        f"`{artifact.spec.name}` pruned by Kinprune: {kept} of {units} units, for images of {height}x{width} pixels.",
        *table,
        "",
        "```python",
        "import kinprune",
        "",
        f'artifact = kinprune.load("{name}")',
        "artifact.model, artifact.classes, artifact.preprocessing",
        "```",
        "",
        f"Classes: {', '.join(artifact.classes)}",
    ]
    return "\n".join(lines) + "\n"


def _plain(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The single values of nested metrics, by dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _plain(f"{prefix}{key}.", value)
        elif isinstance(value, str | int | float):
            yield f"{prefix}{key}", value
