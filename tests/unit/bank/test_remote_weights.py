"""Weights on a real S3 server: whole or not there, whatever becomes of the server; and what is wrong is said."""

from __future__ import annotations

import errno
import http.client
import importlib
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from kinprune.backbones import Backbone
from kinprune.bank import Bank, Record, clean, create_bank, merge, open_bank, verify
from kinprune.bank.backbone import load_bank_backbone
from kinprune.bank.failures import is_transient, reason, refusal
from kinprune.bank.retrying import LostConnection
from kinprune.bank.weights import WeightStore, digest_of
from kinprune.errors import BankError
from kinprune.units import UnitSpace

Make = Callable[..., Record]
S3 = Callable[..., str]
CONTENT = b"weights" * 1000


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinprune.bank.retrying.FIRST_PAUSE", 0.002)


class Front:
    """A server before the S3 server. ``ways`` are what is done to the next requests, in order: nothing after them.

    ``busy`` is an answer of 503, ``failed`` of 500, ``cut`` half an answer, ``lost`` no answer though all was done.
    """

    def __init__(self, port: int) -> None:
        self.ways: list[str] = []
        self.requests: list[str] = []
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                way = front.ways.pop(0) if front.ways else ""
                front.requests.append(self.command)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if way in ("busy", "failed"):
                    self.close_connection = True
                    answer = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
                    self.send_response(503 if way == "busy" else 500)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer if self.command != "HEAD" else b"")
                    return
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request(self.command, self.path, body, dict(self.headers))
                answered = connection.getresponse()
                content = answered.read()
                connection.close()
                self.close_connection = bool(way)
                if way == "lost":
                    return
                self.send_response(answered.status)
                for name, value in answered.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if way == "cut" else content)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def front(s3_server: Any) -> Iterator[Front]:
    front = Front(s3_server.port)
    yield front
    front.server.shutdown()
    front.server.server_close()


def objects(store: WeightStore) -> dict[str, bytes]:
    """What is in the bucket, by its own word."""
    system, root = fsspec.core.url_to_fs(store.url)
    system.invalidate_cache()
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in system.find(root.partition("/")[0])}


def test_an_object_is_put_once_and_whole(s3: S3, front: Front) -> None:
    store = WeightStore(s3(front.endpoint))
    assert list(store.files()) == [] and not store.has(digest_of(CONTENT)) and store.size(digest_of(CONTENT)) is None
    front.requests.clear()
    digest = store.put(CONTENT)
    assert digest == digest_of(CONTENT)
    assert front.requests.count("PUT") == 1 and len(front.requests) <= 3  # no copy, no folder
    front.requests.clear()
    assert store.put(CONTENT) == digest and front.requests == ["HEAD"]
    assert objects(store) == {f"{digest[:2]}/{digest}.safetensors": CONTENT}
    [file] = store.files()
    assert file.digest == digest and store.has(digest) and store.size(digest) == len(CONTENT)
    assert store.get(digest) == CONTENT and list(store.digests()) == [digest]
    front.requests.clear()
    age = store.age(file)
    assert age is not None and age < 600 and front.requests == []  # the list has said so
    store.remove(digest)
    store.remove(digest)  # gone already
    assert objects(store) == {} and not store.has(digest) and store.age(file) is None


def test_a_bank_with_its_weights_on_s3(
    place: Any, backbone: Backbone, space: UnitSpace, make_record: Make, s3: S3, tmp_path: Any
) -> None:
    url = s3()
    bank = create_bank(place.address, backbone, space, store=url)
    assert bank.store.url == url and not list(tmp_path.glob("*weights*"))
    records = [make_record(seed) for seed in range(3)]
    for record in records:
        assert bank.add(record)
    other = open_bank(bank.address)
    for entry, record in zip(other.entries(), records, strict=True):
        found = other.record(entry)
        assert np.array_equal(found.scores, record.scores)
        assert all(torch.equal(found.tensors[name], tensor.half()) for name, tensor in record.tensors.items())
    assert load_bank_backbone(other, 3).fingerprint == backbone.fingerprint
    lonely = bank.store.put(b"nobody's")
    assert verify(other).whole and verify(other).unreferenced == (lonely,)
    assert clean(bank) == () and clean(bank, older_than_seconds=0) == (lonely,)
    bank.remove([other.entries()[1].id])
    assert set(bank.store.digests()) == bank.referenced() and len(bank) == 2
    local = create_bank(tmp_path / "local.db", backbone, space)
    local.add(make_record(7))
    assert merge(local, bank) == (2, 0) and merge(bank, local) == (1, 2)
    assert verify(local).whole and verify(bank).whole and bank.keys() == local.keys()
    with pytest.raises(BankError, match="holds weights already"):
        create_bank(tmp_path / "another.db", backbone, space, store=url)


@pytest.mark.parametrize("way", ["busy", "failed", "cut", "lost"])
def test_what_a_server_fails_at_for_a_while_is_done_in_the_end(s3: S3, front: Front, way: str) -> None:
    store = WeightStore(s3(front.endpoint))

    def twice(operation: Callable[[], Any]) -> Any:
        front.ways = [way] * 2
        answer = operation()
        assert front.ways == []
        return answer

    digest = twice(lambda: store.put(CONTENT))
    assert twice(lambda: store.get(digest)) == CONTENT
    if way != "cut":  # half of no content is no content
        assert twice(lambda: store.size(digest)) == len(CONTENT)
    [file] = twice(lambda: list(store.files()))
    assert file.digest == digest
    if way != "cut":
        twice(lambda: store.remove(digest))
        assert objects(store) == {}


def test_a_server_that_stays_away_is_said_and_the_bank_goes_on_when_it_is_back(
    sqlite_bank: Bank,
    backbone: Backbone,
    space: UnitSpace,
    make_record: Make,
    s3: S3,
    s3_server: Any,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = create_bank(tmp_path / "remote.db", backbone, space, store=s3())
    bank.add(make_record(0))
    sqlite_bank.add(make_record(1))
    [entry] = bank.entries()
    s3_server.stop()
    with monkeypatch.context() as patch:
        patch.setattr("kinprune.bank.retrying.RETRY_SECONDS", 0.02)
        for ask in (
            lambda: bank.add(make_record(1)),
            lambda: bank.tensors(entry),
            lambda: bank.remove([entry.id]) or verify(bank),
            lambda: merge(bank, sqlite_bank),
            lambda: bank.store.has(entry.weights),
            lambda: list(bank.store.files()),
            lambda: verify(bank),
            lambda: clean(bank),
        ):
            with pytest.raises(LostConnection, match=r"the store s3://bucket\d+/weights cannot be reached .* go on"):
                ask()
    threading.Timer(0.3, s3_server.start).start()
    assert bank.add(make_record(1)) and merge(bank, sqlite_bank) == (0, 1)
    assert verify(bank).whole and bank.keys() == {make_record(1).key}
    clean(bank, older_than_seconds=0)
    assert verify(bank).unreferenced == ()


def test_a_server_lost_in_the_middle_of_writing_harms_nothing(
    place: Any, backbone: Backbone, space: UnitSpace, make_record: Make, s3: S3, front: Front
) -> None:
    """Whichever request of an add fails, a record is there once and whole; that in the transaction too."""
    bank = create_bank(place.address, backbone, space, store=s3(front.endpoint))
    front.requests.clear()
    bank.add(make_record(0))
    requests = len(front.requests)
    assert requests >= 3
    for number in range(requests):
        record = make_record(1 + number)
        front.ways = ["" for _ in range(number)] + ["busy" if place.kind == "sqlite" else "lost"]
        assert bank.add(record) is True and front.ways == []
        assert bank.add(record) is False
        bank.remove([bank.entries()[-1].id])
    assert len(bank) == 1 and verify(bank).whole and verify(bank).unreferenced == ()


def damage(store: WeightStore, digest: str, content: bytes | None) -> None:
    system, root = fsspec.core.url_to_fs(store.url)
    path = f"{root}/{digest[:2]}/{digest}.safetensors"
    if content is None:
        system.rm_file(path)
    else:
        system.pipe_file(path, content)


def test_damaged_objects_are_told(
    tmp_path: Any, backbone: Backbone, space: UnitSpace, make_record: Make, s3: S3
) -> None:
    bank = create_bank(tmp_path / "bank.db", backbone, space, store=s3())
    bank.add(make_record(0))
    [entry] = bank.entries()
    whole = bank.store.get(entry.weights)
    for content, words in (
        (whole[:100], "not those that were stored: restore it"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "not those that were stored: restore it"),
        (None, "are not in s3://.*: restore it"),
    ):
        damage(bank.store, entry.weights, content)
        with pytest.raises(BankError, match=words):
            bank.tensors(entry)
        [problem] = verify(bank).problems
        assert problem.record == entry.id
    assert bank.store.put(whole) == entry.weights and verify(bank).whole  # what is gone can be put there again


def test_a_missing_bucket_is_told(
    tmp_path: Any, backbone: Backbone, space: UnitSpace, make_record: Make, s3: S3
) -> None:
    url = s3().replace("bucket", "nowhere")
    with pytest.raises(BankError, match=r"bucket does not exist.*: make the bucket, or correct the address"):
        create_bank(tmp_path / "bank.db", backbone, space, store=url)
    store = WeightStore(url)
    for ask in (
        lambda: store.put(b"x"),
        lambda: store.get("0" * 64),
        lambda: store.has("0" * 64),
        lambda: store.remove("0" * 64),
        lambda: list(store.files()),
    ):
        with pytest.raises(BankError, match="make the bucket, or correct the address") as told:
            ask()
        assert not isinstance(told.value, LostConnection)


def test_denied_access_is_told(tmp_path: Any, backbone: Backbone, space: UnitSpace, s3: S3, s3_server: Any) -> None:
    bank = create_bank(tmp_path / "bank.db", backbone, space, store=s3())

    def open_to_all_for(requests: str) -> None:
        kind = {"Content-Type": "text/plain"}
        address = f"{s3_server.endpoint}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(address, requests.encode(), kind, method="POST")).close()

    open_to_all_for("0")
    try:
        for ask in (
            lambda: bank.store.put(b"x"),
            lambda: bank.store.get(bank.header.backbone_weights),
            lambda: bank.store.has(bank.header.backbone_weights),
            lambda: bank.store.remove(bank.header.backbone_weights),
            lambda: verify(bank),
        ):
            with pytest.raises(BankError, match="give this machine credentials that may read, write") as told:
                ask()
            assert not isinstance(told.value, LostConnection)
    finally:
        open_to_all_for("inf")
    assert verify(bank).whole


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    known = importlib.import_module("fsspec.registry")._registry
    for protocol in ("s3", "s3a"):
        monkeypatch.delitem(known, protocol, raising=False)
    with pytest.raises(BankError, match=r"at s3://bucket \(.*\): install .*: pip install 'kinprune\[s3\]'"):
        list(WeightStore("s3://bucket").files())


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def test_what_comes_back_is_told_from_what_does_not() -> None:
    """Errors as fsspec and the libraries below it have them."""
    from aiohttp import ClientPayloadError, ServerDisconnectedError
    from botocore.exceptions import ClientError, NoCredentialsError, ReadTimeoutError
    from fsspec.exceptions import FSTimeoutError

    def answered(status: int) -> ClientError:
        return ClientError({"Error": {}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")

    for error in (
        ConnectionResetError(errno.ECONNRESET, "reset"),
        OSError(errno.ENETUNREACH, "no network"),
        ServerDisconnectedError(),
        ClientPayloadError(),
        FSTimeoutError(),
        TimeoutError(),
        ReadTimeoutError(endpoint_url="http://here"),
        caused(OSError(errno.EIO, "slow down"), answered(503)),
        answered(429),
    ):
        assert is_transient(error) and refusal(error) is None, error
    for error in (
        OSError(errno.ENOSPC, "full"),
        FileNotFoundError("gone"),
        ValueError("bad"),
        answered(400),
        caused(PermissionError("denied"), answered(403)),
        NoCredentialsError(),
    ):
        assert not is_transient(error), error
        assert (refusal(error) is not None) == (isinstance(error, PermissionError | NoCredentialsError)), error
    assert reason(ValueError()) == "ValueError" and reason(OSError("a\n  b")) == "a b"


def test_passwords_in_addresses_are_not_shown(tmp_path: Any) -> None:
    store = WeightStore("nosuch://me:secret@host/weights")
    with pytest.raises(BankError, match=r"nosuch://\*\*\*@host/weights") as told:
        store.put(b"x")
    assert "secret" not in str(told.value) and store.shown == "nosuch://***@host/weights"
    assert WeightStore(str(tmp_path)).shown == str(tmp_path)
