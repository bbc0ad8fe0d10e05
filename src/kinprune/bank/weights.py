"""Pruned weights as safetensors files named by their own hash, on any path that fsspec knows."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec  # type: ignore[import-untyped]
import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from kinprune.errors import BankError

_GONE = "restore it from a copy of the bank, or remove the record (kinprune bank rm)"


@dataclass(frozen=True)
class WeightStore:
    """A folder of weights: ``url`` is a path, or an address such as ``s3://bucket/folder``."""

    url: str

    @cached_property
    def _place(self) -> tuple[Any, str]:
        try:
            system, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise BankError(
                f"weights cannot be stored at {self.url} ({error}): give a path, or an address whose fsspec package "
                "is installed"
            ) from error
        return system, root

    def _path(self, digest: str) -> str:
        return f"{self._place[1]}/{digest[:2]}/{digest}.safetensors"

    def put(self, content: bytes) -> str:
        """Store a file's bytes whole or not at all, once however often they come, and return their hash."""
        digest = hashlib.sha256(content).hexdigest()
        system, path = self._place[0], self._path(digest)
        try:
            if system.exists(path) and system.size(path) == len(content):
                return digest
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            temporary = f"{path}.{secrets.token_hex(4)}.tmp"
            system.pipe_file(temporary, content)
            system.mv(temporary, path)
        except OSError as error:
            raise BankError(
                f"weights cannot be written to {self.url} ({error}): free space, or check access"
            ) from error
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of a hash; BankError where they are not there or are not those that were stored."""
        try:
            content: bytes = self._place[0].cat_file(self._path(digest))
        except OSError as error:
            raise BankError(f"the weights {digest[:12]} are not in {self.url} ({error}): {_GONE}") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise BankError(f"the weights {digest[:12]} in {self.url} are not those that were stored: {_GONE}")
        return content

    def remove(self, digest: str) -> None:
        """Remove a file, if it is there."""
        system, path = self._place[0], self._path(digest)
        if system.exists(path):
            system.rm_file(path)

    def digests(self) -> Iterator[str]:
        """The hashes of all complete files."""
        system, root = self._place
        if not system.exists(root):
            return
        for path in sorted(system.find(root)):
            name = path.rpartition("/")[2]
            if name.endswith(".safetensors"):
                yield name.removesuffix(".safetensors")


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, lossless: bool = False) -> bytes:
    """Tensors as a safetensors file in half precision; ``lossless`` only where that changes no number.

    A tensor with numbers beyond half precision's range stays as it is; integers do too.
    """
    packed = {name: _halved(tensor.detach().cpu(), lossless).contiguous() for name, tensor in tensors.items()}
    return write_tensors(packed, dict(metadata) if metadata else None)


def _halved(tensor: Tensor, lossless: bool) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor.clone()
    half = tensor.half()
    fits = torch.equal(half.to(tensor.dtype), tensor) if lossless else bool(half.isfinite().all())
    return half if fits else tensor.clone()


def unpack(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file; BankError where it is none."""
    try:
        return read_tensors(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BankError(f"stored weights are no safetensors file ({error}): {_GONE}") from error
