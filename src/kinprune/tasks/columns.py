"""Which columns of a parquet file hold the images and the labels, from its schema alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kinprune.errors import TaskError
from kinprune.tasks.classes import listed, suggest
from kinprune.tasks.packages import require

IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
LABEL_NAMES = (
    *("label", "labels", "class", "classes", "category", "target", "y", "cls", "species", "class_name", "label_name"),
    *("fine_label", "coarse_label", "label_fine", "label_coarse", "class_id", "label_id"),
)


@dataclass(frozen=True)
class Columns:
    """The image column, the leaf of it that holds encoded images, the label column and its names if declared."""

    image: str
    leaf: str
    label: str
    names: tuple[str, ...] | None


def find_columns(schema: Any, source: str, image: str | None = None, label: str | None = None) -> Columns:
    """Find the columns of a pyarrow schema; ``image`` and ``label`` name them where given.

    Declared features (``Image``, ``ClassLabel``) come before types (a struct with ``bytes``) and those before
    customary names. Raises TaskError, listing the candidates, where none or several are found.
    """
    features = _features(schema.metadata)
    image = _one(source, "image", image, schema.names, _image_candidates(schema, features))
    label = _one(source, "label", label, schema.names, _label_candidates(schema, features))
    if image == label:
        raise TaskError(f"{source}: column {image!r} cannot be both image and label")
    return Columns(image, _leaf(schema, image, source), label, _names(features.get(label)))


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    try:
        declared = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        features = declared["info"]["features"]
    except (ValueError, KeyError, TypeError):  # the columns' types and names remain to go by
        return {}
    return features if isinstance(features, dict) else {}


def _kind(feature: Any) -> str | None:
    kind = feature.get("_type") if isinstance(feature, dict) else None
    return kind if isinstance(kind, str) else None


def _image_candidates(schema: Any, features: Mapping[str, Any]) -> list[str]:
    types = require("pyarrow", "reading parquet").types
    declared = [name for name in schema.names if _kind(features.get(name)) == "Image"]
    structs = [field.name for field in schema if types.is_struct(field.type) and _has_bytes(field.type)]
    named = [field.name for field in schema if _is_bytes(field.type) and field.name.lower() in IMAGE_NAMES]
    return declared or structs or named


def _label_candidates(schema: Any, features: Mapping[str, Any]) -> list[str]:
    declared = [name for name in schema.names if _kind(features.get(name)) == "ClassLabel"]
    named = [field.name for field in schema if is_label_type(field.type) and field.name.lower() in LABEL_NAMES]
    return declared or named


def is_label_type(kind: Any) -> bool:
    """Whether a pyarrow type can hold class labels: whole numbers, text, booleans, dictionary-coded or not."""
    types = require("pyarrow", "reading parquet").types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind)
    )


def _is_bytes(kind: Any) -> bool:
    types = require("pyarrow", "reading parquet").types
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _has_bytes(struct: Any) -> bool:
    return struct.get_field_index("bytes") >= 0 and _is_bytes(struct.field("bytes").type)


def _one(source: str, role: str, named: str | None, columns: Sequence[str], candidates: Sequence[str]) -> str:
    if named is not None:
        if named not in columns:
            raise TaskError(f"{source}: there is no column {named!r} for the {role}; {suggest(named, columns)}")
        return named
    if len(candidates) == 1:
        return candidates[0]
    argument, option = f"{role}_column", f"--{role}-column"
    if not candidates:
        raise TaskError(
            f"{source}: no {role} column is recognised among {listed(columns)}; name it with {argument}=... ({option})"
        )
    raise TaskError(
        f"{source}: the {role} column may be {listed(candidates)}; "
        f"choose with {argument}={candidates[0]!r} ({option}) or another"
    )


def _leaf(schema: Any, image: str, source: str) -> str:
    kind = schema.field(image).type
    if _is_bytes(kind):
        return image
    if require("pyarrow", "reading parquet").types.is_struct(kind) and _has_bytes(kind):
        return f"{image}.bytes"
    raise TaskError(
        f"{source}: column {image!r} is of type {kind}; expected encoded images, as binary or as a struct with 'bytes'"
    )


def _names(feature: Any) -> tuple[str, ...] | None:
    names = feature.get("names") if _kind(feature) == "ClassLabel" else None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None
