"""hf:// addresses: taken apart, files chosen, the cache used where there is no network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kinprune.errors import TaskError
from kinprune.tasks import load_task
from kinprune.tasks.hub import Address, choose_files, parse_address

hub = pytest.importorskip("huggingface_hub", reason="hf:// sources need huggingface_hub")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's client cut off from the network, with an empty cache of its own."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_addresses() -> None:
    assert parse_address("hf://someone/birds") == Address("someone/birds")
    assert parse_address("hf://someone/birds/small@v1") == Address("someone/birds", "small", "v1")
    assert parse_address("hf://someone/birds@refs/pr/1") == Address("someone/birds", None, "refs/pr/1")
    for wrong in ("hf://birds", "hf://", "hf://a/b/c/d", "hf://a//b"):
        with pytest.raises(TaskError, match="expected hf://owner/name"):
            parse_address(wrong)


def test_files_of_the_configuration() -> None:
    one = Address("a/b")
    assert choose_files(["README.md", "data/test-0.parquet", "data/train-0.parquet"], one) == [
        "data/test-0.parquet",
        "data/train-0.parquet",
    ]
    assert choose_files(["train.parquet", "test.parquet"], one) == ["test.parquet", "train.parquet"]
    assert choose_files(["only/train/0.parquet"], one) == ["only/train/0.parquet"]
    assert choose_files(["README.md", "images.zip"], one) == []
    two = ["big/train-0.parquet", "small/train-0.parquet"]
    assert choose_files(two, Address("a/b", "small")) == ["small/train-0.parquet"]
    with pytest.raises(TaskError, match="configurations 'big', 'small'; choose with hf://a/b/big"):
        choose_files(two, one)
    with pytest.raises(TaskError, match="no configuration 'tiny'; it has 'big', 'small'"):
        choose_files(two, Address("a/b", "tiny"))
    assert choose_files([*two, "default/train-0.parquet"], one) == ["default/train-0.parquet"]


def test_without_network(offline: Path) -> None:
    with pytest.raises(TaskError, match="hf://someone/birds cannot be fetched and is not in the local cache"):
        load_task("hf://someone/birds")


def test_from_the_cache(offline: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    commit = "0" * 40
    repository = offline / "datasets--someone--birds"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    data = repository / "snapshots" / commit / "data"
    data.mkdir(parents=True)
    for part, count in (("train", 6), ("test", 2)):
        rows = {"image": [{"bytes": b"later", "path": ""}] * count, "label": ["owl", "tit"] * (count // 2)}
        pq.write_table(pa.table(rows), data / f"{part}-00000-of-00001.parquet")
    task = load_task("hf://someone/birds")
    assert (task.name, task.classes, len(task.train), len(task.test)) == ("birds", ("owl", "tit"), 6, 2)
    with pytest.raises(TaskError, match="not in the local cache"):
        load_task("hf://someone/birds@other")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(TaskError, match="hf://a/b needs the package 'huggingface-hub'"):
        load_task("hf://a/b")
