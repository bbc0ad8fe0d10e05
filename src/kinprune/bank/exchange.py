"""A record as a file of its own: what one place learnt from a task goes to any bank of the same backbone."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from torch import Tensor

from kinprune.bank.coding import decode_probe, decode_units, seal
from kinprune.bank.record import Accuracy, Header, Record, check_record
from kinprune.bank.rows import rows_of
from kinprune.bank.weights import pack, unpack
from kinprune.errors import BankError
from kinprune.units import Mask

VERSION = 1
"""The newest layout of the file, and the only one that this version reads and writes."""

_ENTRY, _UNITS, _PROBE, _WEIGHTS = "kinprune-record", "units", "probe", "weights/"
_LIMIT = 100_000_000
"""The longest header that safetensors reads."""
_AGAIN = "copy it again from where it was made, or adapt again"


def write_record(record: Record, header: Header, path: str | Path) -> Path:
    """Write a record of a bank as one safetensors file, whole or not at all, over what may be there; return its path.

    The ranking, scores and mask (``coding.encode_units``) and the probe (``encode_probe``) are bytes, the weights in
    half precision as ``weights.pack`` has them. All else is JSON in the one entry of the file's metadata, with a seal
    over everything. The same record gives the same bytes.

    Raises:
        BankError: the record does not fit the bank, or the file cannot be written.
    """
    check_record(header, record)
    place = Path(path).expanduser()
    halved = pack(record.tensors)
    rows = rows_of(record, header, halved)
    tensors = {f"{_WEIGHTS}{name}": tensor for name, tensor in unpack(halved).items()}
    for name, content in ((_UNITS, rows.units["content"]), (_PROBE, rows.probe["content"])):
        tensors[name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    described = {
        "version": VERSION,
        "key": record.key,
        "name": rows.record["name"],
        "classes": list(record.classes),
        "accuracy": {name: float(share) for name, share in vars(record.accuracy).items()},
        "details": json.loads(rows.record["details"]),
        "backbone": header.backbone,
        "space": header.space,
        "about": _about(header),
    }
    text = json.dumps({**described, "seal": _seal(described, tensors)}, sort_keys=True, allow_nan=False)
    _write(place, pack(tensors, {_ENTRY: text}))
    return place


def read_record(path: str | Path, header: Header) -> Record:
    """The record in a file that ``write_record`` wrote, for a bank with this header.

    Raises:
        BankError: the file is not there, is no record's, is cut off, altered, of a newer version, or about another
            backbone or unit space.
    """
    place = Path(path).expanduser()
    text, tensors = _read(place)
    described = _described(place, text)
    _check_seal(place, described, tensors)
    _check_about(place, described, header)
    try:
        record = _decoded(described, tensors, header)
        check_record(header, record)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BankError(f"{place} is sealed, but what it holds is no record ({error!r}): {_AGAIN}") from error
    except BankError as error:
        raise BankError(f"{place} cannot be used: {error}") from error
    return record


def _about(header: Header) -> str:
    """The model and units that a header is about, in words: what is said of a file and a bank that do not fit."""
    height, width = header.preprocessing.image_size
    return (
        f"{header.spec.architecture} at {height} x {width} pixels {'with' if header.stream else 'without'} the "
        f"residual stream, {header.units} units (backbone {header.backbone[:12]}, unit space {header.space[:12]})"
    )


def _seal(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The hash of all that a file holds: of what it says, and of each tensor's name, type, shape and bytes."""
    contents: list[bytes | str] = [json.dumps(dict(described), sort_keys=True)]
    for name, tensor in sorted(tensors.items()):
        contents += [name, str(tensor.dtype), str(list(tensor.shape)), _bytes_of(tensor)]
    return seal(str(described.get("key")), "exchange", *contents)


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _write(place: Path, content: bytes) -> None:
    """Complete a file beside the target and move it there: an interrupted write leaves what was there before."""
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except OSError as error:
        raise BankError(
            f"{place} cannot be written ({error.strerror}): make its folder, free space, or check access"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # moved into place, there is none
            temporary.unlink()


def _read(place: Path) -> tuple[str, dict[str, Tensor]]:
    """A file's metadata entry and its tensors; refuses what is no safetensors file of a record."""
    try:
        content = place.read_bytes()
    except OSError as error:
        raise BankError(f"{place} cannot be read ({error.strerror}): give the record.safetensors of adapt") from error
    if _is_cut_off(content):
        raise BankError(f"{place} is cut off after {len(content):,} bytes: {_AGAIN}")
    try:
        tensors = read_tensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise BankError(
            f"{place} is damaged, or no safetensors file ({error}): give the record.safetensors of adapt"
        ) from error
    metadata = header.get("__metadata__") or {}
    if _ENTRY not in metadata:
        raise BankError(
            f"{place} is a safetensors file, but holds no record of a bank: give the record.safetensors of adapt"
        )
    return metadata[_ENTRY], tensors


def _is_cut_off(content: bytes) -> bool:
    """Whether a file begins as safetensors files do and ends before it says that it does."""
    length = int.from_bytes(content[:8], "little")
    if len(content) <= 8:
        return True
    if length > _LIMIT or content[8:9] != b"{":
        return False
    if len(content) < 8 + length:
        return True
    try:
        header = json.loads(content[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return len(content) - 8 - length < max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False  # it is something worse, which reading it says


def _described(place: Path, text: str) -> dict[str, Any]:
    """What a file says of its record; refuses a newer layout, whose seal may be another."""
    try:
        described = json.loads(text)
        version = described["version"]
        newer = version > VERSION
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BankError(f"{place} was altered or damaged, its description is unreadable: {_AGAIN}") from error
    if newer:
        raise BankError(
            f"{place} has the layout {version}, expected {VERSION}: it was made by a newer Kinprune, upgrade that"
        )
    return dict(described)


def _check_seal(place: Path, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    sealed = {name: value for name, value in described.items() if name != "seal"}
    if described.get("seal") != _seal(sealed, tensors):
        raise BankError(f"{place} was altered or damaged, it is not what its seal says: {_AGAIN}")


def _check_about(place: Path, described: Mapping[str, Any], header: Header) -> None:
    if (described.get("backbone"), described.get("space")) == (header.backbone, header.space):
        return
    what = "unit space" if described.get("backbone") == header.backbone else "backbone"
    raise BankError(
        f"{place} is of another {what} than the bank: it is about {described.get('about')}, the bank about "
        f"{_about(header)}: add it to a bank of its own {what}"
    )


def _decoded(described: Mapping[str, Any], tensors: Mapping[str, Tensor], header: Header) -> Record:
    classes = tuple(map(str, described["classes"]))
    units, probe = (_bytes_of(tensors[name]) for name in (_UNITS, _PROBE))
    ranking, scores, kept = decode_units(units, header.groups)
    return Record(
        key=str(described["key"]),
        name=str(described["name"]),
        classes=classes,
        ranking=ranking,
        scores=scores,
        mask=Mask(np.asarray(kept), header.space),
        probe=decode_probe(probe, len(classes), header.features),
        accuracy=Accuracy(**{name: float(share) for name, share in described["accuracy"].items()}),
        tensors={name.removeprefix(_WEIGHTS): tensor for name, tensor in tensors.items() if name.startswith(_WEIGHTS)},
        details=dict(described["details"]),
    )
