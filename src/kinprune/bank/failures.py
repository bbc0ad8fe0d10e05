"""What an error of a file system means, whatever its kind: those of remote ones have no common class.

fsspec turns some errors of the libraries below it into OSErrors and lets others through: botocore's, aiohttp's, ...
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Iterator
from typing import Any

_COMES_BACK = frozenset(
    (
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
    )
)

_CLASSES = frozenset(
    (
        "ConnectionError",  # botocore, requests
        "HTTPClientError",  # botocore: time-outs, connections closed
        "ResponseStreamingError",
        "IncompleteReadError",
        "ClientConnectionError",  # aiohttp
        "ClientPayloadError",
        "ServiceRequestError",  # azure
        "ServiceResponseError",
        "TransportError",  # google
        "SSHException",  # paramiko
    )
)
"""Names of the classes that libraries have for what no answer came to."""


def is_transient(error: BaseException) -> bool:
    """Whether the same may well go right in a while: no answer came, or a server's that it cannot do it now."""
    for each in _chain(error):
        status = _status(each)
        if status is not None:
            return status >= 500 or status in (408, 429)
        if isinstance(each, (TimeoutError, asyncio.TimeoutError)) or getattr(each, "errno", None) in _COMES_BACK:
            return True
        if _CLASSES & {kind.__name__ for kind in type(each).__mro__}:
            return True
    return False


def refusal(error: BaseException) -> str | None:
    """What to do about a place that is not there or not open to this user; None where that is not what is wrong."""
    said = " ".join(str(each) for each in _chain(error))
    if found := re.search("(bucket|container) does not exist", said, re.IGNORECASE):
        return f"make the {found[1].lower()}, or correct the address"
    if isinstance(error, PermissionError) or any(
        _status(each) in (401, 403) or "Credentials" in type(each).__name__ for each in _chain(error)
    ):
        return "give this machine credentials that may read, write, list and remove there"
    return None


def reason(error: BaseException) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: Any) -> int | None:
    """The status of the answer over HTTP that an error is about."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    for name in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs
        found = getattr(error, name, None)
        if isinstance(found, int) and 100 <= found < 600:
            return found
    return None
