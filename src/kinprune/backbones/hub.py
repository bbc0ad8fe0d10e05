"""timm's published weights: the safetensors file of a model, from the hub's cache or the network."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from pathlib import Path

import timm
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from kinprune.backbones.spec import architecture_name
from kinprune.errors import BackboneError

_REMEDY = "Give a local safetensors file with --weights, or --random for an untrained model."
_TIMEOUT_S = 5.0


def fetch_weights(name: str) -> Path:
    """The local path of the safetensors file timm publishes for ``name``, downloaded on first use.

    Raises BackboneError within seconds where nothing is published as safetensors or the network is not there.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        others = timm.list_pretrained(f"{architecture_name(name)}.*")
        hint = f"Tags that have some: {', '.join(others)}. " if others else ""
        raise BackboneError(f"timm publishes no pre-trained weights of {name!r}. {hint}{_REMEDY}")
    if not config.hf_hub_id:
        raise BackboneError(
            f"timm publishes the weights of {name!r} only as a pickle, which is never read here. {_REMEDY}"
        )
    repository, _, revision = config.hf_hub_id.partition("@")
    filename = str(Path(config.hf_hub_filename or "model").with_suffix(".safetensors"))
    try:
        return _download(repository, filename, revision, offline=True)
    except (EntryNotFoundError, OSError):
        _check_network(name)
    try:
        return _download(repository, filename, revision, offline=False)
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BackboneError(f"The weights of {name!r} could not be downloaded: {error}. {_REMEDY}") from error


def _download(repository: str, filename: str, revision: str, *, offline: bool) -> Path:
    path = hf_hub_download(
        repository, filename, revision=revision or None, etag_timeout=_TIMEOUT_S, local_files_only=offline
    )
    return Path(path)


def _check_network(name: str) -> None:
    """Ask the hub once, because its client retries for half a minute before it says that there is no network."""
    if constants.HF_HUB_OFFLINE:
        raise BackboneError(f"The weights of {name!r} are not on this machine and HF_HUB_OFFLINE is set. {_REMEDY}")
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            return
    except urllib.error.HTTPError:
        return  # an answer, though not a kind one
    except OSError as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            return  # the hub's client has its own certificates
        raise BackboneError(
            f"The weights of {name!r} are not on this machine and {constants.ENDPOINT} cannot be reached ({error}). "
            f"{_REMEDY}"
        ) from error
