"""Data sets on the Hugging Face hub, fetched as the parquet files they are stored or mirrored in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kinprune.errors import TaskError
from kinprune.tasks.classes import listed
from kinprune.tasks.packages import require

SCHEME = "hf://"
MIRROR = "refs/convert/parquet"  # where the hub keeps a parquet copy of data sets stored otherwise
DEFAULT = "default"
_NO_CONFIG = frozenset({"data", "train", "test", "val", "valid", "validation", DEFAULT})


@dataclass(frozen=True)
class Address:
    """``hf://owner/name``, ``hf://owner/name/config``, either with ``@revision``."""

    repo: str
    config: str | None = None
    revision: str | None = None


def parse_address(text: str) -> Address:
    """Take a ``hf://`` address apart; raises TaskError where it is malformed."""
    path, _, revision = text.removeprefix(SCHEME).partition("@")
    words = path.strip("/").split("/")
    if len(words) not in (2, 3) or not all(words):
        raise TaskError(f"{text!r}: expected hf://owner/name or hf://owner/name/config, with @revision if wanted")
    return Address("/".join(words[:2]), words[2] if len(words) == 3 else None, revision or None)


def choose_files(files: Sequence[str], address: Address) -> list[str]:
    """Return the parquet files of the address's configuration among a repository's files; [] if there is no parquet.

    The first folder of a path names the configuration. Raises TaskError where it is unknown, or not given and
    there are several.
    """
    parquet = sorted(name for name in files if name.lower().endswith(".parquet"))
    by_config: dict[str, list[str]] = {}
    for name in parquet:
        by_config.setdefault(_config(name), []).append(name)
    if not parquet:
        return []
    wanted = address.config or (next(iter(by_config)) if len(by_config) == 1 else DEFAULT)
    if wanted in by_config:
        return by_config[wanted]
    configs = listed(sorted(by_config))
    if address.config is not None:
        raise TaskError(f"{SCHEME}{address.repo} has no configuration {address.config!r}; it has {configs}")
    raise TaskError(
        f"{SCHEME}{address.repo} has the configurations {configs}; choose with {SCHEME}{address.repo}/{min(by_config)}"
    )


def _config(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return DEFAULT if not slash or folder.lower() in _NO_CONFIG else folder


def fetch(text: str) -> tuple[Path, list[str]]:
    """Download a data set's parquet files once; return the folder they lie in and their paths within it.

    The hub's own cache is used, alone where there is no network. Raises TaskError without the package
    ``huggingface_hub``, and where neither hub nor cache has the data set as parquet.
    """
    address = parse_address(text)
    hub = require("huggingface_hub", f"{text}")
    # Which HTTP library its network errors come from depends on its version: the bases of its own error tell.
    network_errors = (OSError, ValueError, *hub.errors.HfHubHTTPError.__bases__)
    try:
        for revision in [address.revision] if address.revision else ["main", MIRROR]:
            listing = hub.list_repo_files(address.repo, repo_type="dataset", revision=revision)
            names = choose_files(listing, address)
            if names:
                root = hub.snapshot_download(address.repo, repo_type="dataset", revision=revision, allow_patterns=names)
                return Path(root), names
    except network_errors as error:
        return _cached(address, text, error)
    raise TaskError(f"{text} holds no parquet files, nor does its mirror; download it and give its image folder")


def _cached(address: Address, text: str, cause: Exception) -> tuple[Path, list[str]]:
    hub = require("huggingface_hub", f"{text}")
    for revision in [address.revision] if address.revision else ["main", MIRROR]:
        try:
            root = Path(
                hub.snapshot_download(address.repo, repo_type="dataset", revision=revision, local_files_only=True)
            )
        except (OSError, ValueError):  # this revision is not in the cache; the cause below is what to tell
            continue
        names = choose_files([path.relative_to(root).as_posix() for path in root.rglob("*.parquet")], address)
        if names:
            return root, names
    first_line = next(iter(str(cause).splitlines()), type(cause).__name__)
    raise TaskError(
        f"{text} cannot be fetched and is not in the local cache ({first_line}); check the name, the network and, "
        "for a private data set, `hf auth login`; or give a parquet file or an image folder"
    ) from cause
