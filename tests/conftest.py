"""What several tests share: the real data where it is there, and small image folders made on the spot."""

from __future__ import annotations

import importlib.util
import logging
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell, which takes Ctrl-C away from all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data (``data/``) and pre-trained weights (``weights/``); skips where it is absent."""
    root = Path(os.environ.get("KINPRUNE_SHARED") or REPOSITORY.parent / "shared")
    if not (root / "data").is_dir():
        pytest.skip(f"no real data in {root}: set KINPRUNE_SHARED to a folder with data/ and weights/")
    return root


def class_image(name: str, number: int, size: int | tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels uint8 [h, w, 3] of a class's image: the class's own colours and stripes, the image's own noise.

    Classes can be told apart, so that a model trained on such images gets better.
    """
    height, width = (size, size) if isinstance(size, int) else size
    of_class = np.random.default_rng(zlib.crc32(name.encode()))
    of_image = np.random.default_rng([zlib.crc32(name.encode()), number])
    period, base, stripe = of_class.integers(2, 7), of_class.integers(30, 120, 3), of_class.integers(60, 110, 3)
    phase = np.arange(height)[:, None] if of_class.random() < 0.5 else np.arange(width)[None, :]
    on = (phase + of_image.integers(period)) // period % 2
    pixels = base + np.broadcast_to(on, (height, width))[..., None] * stripe
    return np.clip(pixels + of_image.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def write_folder(root: Path, classes: Sequence[str], per_class: int, size: int | tuple[int, int] = 16) -> Path:
    """Write ``per_class`` PNG images for each class into ``root/<class>/`` and return ``root``."""
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            Image.fromarray(class_image(name, number, size)).save(root / name / f"{number:04d}.png")
    return root


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """``make_folder(root, classes, per_class, size=16)``: an image folder to learn from; see ``write_folder``."""
    return write_folder


@pytest.fixture(scope="session")
def make_pixels() -> Callable[..., NDArray[np.uint8]]:
    """``make_pixels(class_name, number, size)``: one image of such a folder, uint8 [h, w, 3]."""
    return class_image


def find_postgresql() -> Path | None:
    """The folder of PostgreSQL's server programs: on the path, or where Debian puts them; the newest of several."""
    on_path = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    programs = Path(on_path).parent if on_path else found[-1].parent if found else None
    return programs if programs and (programs / "postgres").exists() else None


class PostgreSQL:
    """A server on a socket in a folder of its own, with its data there: it can be stopped and started again."""

    def __init__(self, programs: Path) -> None:
        self.programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="kp-pg-", dir="/tmp"))  # a socket's path may have 107 bytes
        self.url = f"postgresql+psycopg://kinprune@/postgres?host={self.folder}"
        self.log = (self.folder / "log").open("wb")
        self.run: dict[str, Any] = {"cwd": self.folder, "stdout": self.log, "stderr": self.log}
        if os.geteuid() == 0:  # initdb refuses to run as root
            account = pwd.getpwnam(next(name for name in ("postgres", "nobody") if name in known_users()))
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self.run |= {"user": account.pw_name, "group": account.pw_gid, "extra_groups": []}

    def make(self) -> None:
        make = ("-U", "kinprune", "--auth=trust", "--no-sync", "-E", "UTF8")
        subprocess.run([self.programs / "initdb", "-D", self.folder / "data", *make], check=True, **self.run)
        self.start()

    def start(self) -> None:
        settings = ("listen_addresses=", "fsync=off", "shared_buffers=16MB", "max_connections=40")
        place = ("-D", self.folder / "data", "-k", self.folder)
        self.server = subprocess.Popen(
            [self.programs / "postgres", *place, *(f"--{setting}" for setting in settings)], **self.run
        )
        wait_for_socket(self.folder, self.server)

    def stop(self) -> None:
        """At once, as in a crash: whoever is connected loses the connection, and what was not committed is gone."""
        self.server.send_signal(signal.SIGQUIT)
        self.server.wait(60)

    def remove(self) -> None:
        if hasattr(self, "server"):
            self.stop()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A throw-away server.

    Without PostgreSQL's programs the tests that need it are skipped; where ``CI`` is set they fail.
    """
    programs = find_postgresql()
    if programs is None:
        reason = "no PostgreSQL server here: apt-get install postgresql"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    server = PostgreSQL(programs)
    try:
        server.make()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def postgresql_server(postgresql: PostgreSQL) -> str:
    """The URL of the throw-away server's database."""
    return postgresql.url


def known_users() -> set[str]:
    """The names of this machine's users."""
    return {account.pw_name for account in pwd.getpwall()}


def wait_for_socket(folder: Path, server: subprocess.Popen[bytes]) -> None:
    """Return once a server answers; fail with what it logged where it ended or takes too long."""
    import psycopg

    for _ in range(300):
        try:
            psycopg.connect(f"host={folder} user=kinprune dbname=postgres").close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
    raise AssertionError((folder / "log").read_text())


@pytest.fixture(scope="session")
def make_database(postgresql_server: str) -> Callable[[], str]:
    """``make_database()``: the URL of an empty place in PostgreSQL, a schema of its own: quicker than a database."""
    import psycopg

    numbers = count()

    def make() -> str:
        name = f"test{next(numbers)}"
        with psycopg.connect(postgresql_server.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")  # type: ignore[call-overload]
        return f"{postgresql_server}&options=-csearch_path%3D{name}"

    return make


class S3:
    """An S3 server of this process on a port of its own, which can be stopped and started; what it holds stays."""

    def __init__(self) -> None:
        self.port, self.buckets = 0, count()
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def stop(self) -> None:
        self.server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """The server; without moto or s3fs the tests that need it are skipped, where ``CI`` is set they fail."""
    missing = [name for name in ("moto", "s3fs") if find_spec(name) is None]
    if missing:
        reason = f"no {missing[0]} here: pip install -e '.[dev]'"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = S3()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """``s3(endpoint)`` points all that this process does on S3 to an endpoint, or to the server itself.

    It gives the address of a folder in a new bucket.
    """
    from s3fs import S3FileSystem

    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # what is tried again here is tried by us
    monkeypatch.setattr(S3FileSystem, "retries", 1)

    def point(endpoint: str = "") -> str:
        bucket = f"bucket{next(s3_server.buckets)}"
        S3FileSystem.clear_instance_cache()
        S3FileSystem(endpoint_url=s3_server.endpoint).mkdir(bucket)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint or s3_server.endpoint)
        return f"s3://{bucket}/weights"

    yield point
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def load_builder() -> Callable[[], ModuleType]:
    """``load_builder()``: the module that builds in processes of their own, for tests that stop them; a fresh one."""
    path = REPOSITORY / "tests" / "integration" / "builder.py"

    def load() -> ModuleType:
        specification = importlib.util.spec_from_file_location("builder", path)
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def empty_bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``bank.db``, an empty bank of a tiny model for two classes at 32 pixels; to be copied."""
    import kinprune as kp
    from kinprune.bank import create_bank
    from kinprune.units import find_units

    folder = tmp_path_factory.mktemp("empty")
    backbone = kp.load_backbone("test_resnet", num_classes=2, random=True, image_size=32)
    space = find_units(backbone.model, backbone.preprocessing.image_size, head=backbone.head)
    create_bank(folder / "bank.db", backbone, space).close()
    return folder
