"""Pruned weights as safetensors files named by their own hash, on any path that fsspec knows."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

import fsspec  # type: ignore[import-untyped]
import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from kinprune.bank.failures import is_transient, reason, refusal
from kinprune.bank.retrying import LostConnection, retried
from kinprune.errors import BankError

_GONE = "restore it from a copy of the bank, or remove the record (kinprune bank rm)"


@dataclass(frozen=True)
class StoredFile:
    """A file of a store: ``path`` as its file system names it; ``digest`` None for what a broken-off write left."""

    path: str
    digest: str | None


@dataclass(frozen=True)
class WeightStore:
    """A folder of weights: ``url`` is a path, or an address such as ``s3://bucket/folder``.

    What a file system that cannot be reached fails at is tried again for a while, and then a ``LostConnection``.
    """

    url: str

    @property
    def shown(self) -> str:
        """The address without its passwords, to be shown."""
        return re.sub("://[^/]*@", "://***@", self.url)

    @cached_property
    def _place(self) -> tuple[Any, str]:
        try:
            system, root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # each file system has its own kinds
            package = "'kinprune[s3]'" if self.url.startswith(("s3:", "s3a:")) else "fsspec's package for it"
            missing = f"install what is missing: pip install {package}"
            advice = missing if isinstance(error, ImportError) else "give a path, or an address that fsspec knows"
            raise BankError(f"weights cannot be stored at {self.shown} ({reason(error)}): {advice}") from error
        return system, root

    def _path(self, digest: str) -> str:
        if not is_digest(digest):  # it may come from a row that somebody changed
            raise BankError(f"{digest[:80]!r} is no hash of stored weights: {_GONE}")
        return f"{self._place[1]}/{digest[:2]}/{digest}.safetensors"

    @contextmanager
    def _told(self, what: str, advice: str) -> Iterator[None]:
        """Say what fails in a file system, whatever kind of error it has for that."""
        try:
            yield
        except BankError:
            raise
        except Exception as error:  # those of remote file systems are often no OSError
            if is_transient(error):
                raise LostConnection(f"the store {self.shown}", reason(error)) from error
            raise BankError(f"{what} ({reason(error)}): {refusal(error) or advice}") from error

    @retried
    def put(self, content: bytes) -> str:
        """Store a file's bytes whole or not at all, once however often they come, and return their hash."""
        digest = digest_of(content)
        system, path = self._place[0], self._path(digest)
        with self._told(f"weights cannot be written to {self.shown}", "free space, or check access"):
            if self._size(path) == len(content):
                return digest
            if not _OBJECTS.isdisjoint(_protocols(system)):
                system.pipe_file(path, content)  # nobody sees an object before it is whole, and there are no folders
                return digest
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            temporary = f"{path}.{secrets.token_hex(4)}.tmp"
            system.pipe_file(temporary, content)
            system.mv(temporary, path)
        return digest

    @retried
    def _size(self, path: str) -> int | None:
        """The bytes of a file as it is now; None where there is none: others write and remove here too."""
        system = self._place[0]
        with self._told(f"the weights in {self.shown} cannot be looked at", "check access"):
            system.invalidate_cache()
            try:
                return int(system.size(path))
            except FileNotFoundError as error:
                if refusal(error):
                    raise
                return None

    def size(self, digest: str) -> int | None:
        """The bytes of a file; None where it is not there."""
        return self._size(self._path(digest))

    def has(self, digest: str) -> bool:
        """Whether a file is there now."""
        return is_digest(digest) and self._size(self._path(digest)) is not None

    @retried
    def get(self, digest: str) -> bytes:
        """The bytes of a hash; BankError where they are not there or are not those that were stored."""
        path = self._path(digest)
        with self._told(f"the weights {digest[:12]} are not in {self.shown}", _GONE):
            content: bytes = self._place[0].cat_file(path)
        if digest_of(content) != digest:
            raise BankError(f"the weights {digest[:12]} in {self.shown} are not those that were stored: {_GONE}")
        return content

    def remove(self, digest: str) -> None:
        """Remove a file, if it is there."""
        self.discard(self._path(digest))

    @retried
    def discard(self, path: str) -> None:
        """Remove the file at one of the paths that ``files`` gives, if it is there."""
        system = self._place[0]
        with self._told(f"{path} cannot be removed from {self.shown}", "check access"):
            try:
                system.rm_file(path)
            except FileNotFoundError as error:
                if refusal(error):
                    raise
            system.invalidate_cache()

    @retried
    def _paths(self) -> list[str]:
        system, root = self._place
        with self._told(f"the weights in {self.shown} cannot be listed", "check access"):
            system.invalidate_cache()
            return sorted(system.find(root))

    def files(self) -> Iterator[StoredFile]:
        """All weights, and what writes that broke off left behind; other files are not the store's."""
        for path in self._paths():
            if match := _FILE.search(path):
                yield StoredFile(path, None if match[2] else match[1])

    def digests(self) -> Iterator[str]:
        """The hashes of all complete files."""
        return (file.digest for file in self.files() if file.digest is not None)

    @retried
    def age(self, file: StoredFile) -> float | None:
        """Seconds since a file was written; None where the file system does not know, or the file is gone."""
        with self._told(f"the weights in {self.shown} cannot be looked at", "check access"):
            try:
                modified = self._place[0].modified(file.path)
            except (NotImplementedError, FileNotFoundError):
                return None
        known = modified if modified.tzinfo else modified.replace(tzinfo=timezone.utc)
        return float((datetime.now(timezone.utc) - known).total_seconds())


_OBJECTS = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"))
"""Protocols of object stores, in which what is written appears whole or not at all."""


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


_FILE = re.compile(r"/([0-9a-f]{64})\.safetensors(\.[0-9a-f]+\.tmp)?$")


def is_digest(text: str) -> bool:
    """Whether a text is a hash as this store names files by."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def digest_of(content: bytes) -> str:
    """The hash under which bytes are stored."""
    return hashlib.sha256(content).hexdigest()


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
