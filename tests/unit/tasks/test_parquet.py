"""Parquet sources: columns found or asked for, parts by name, rows read lazily, bad labels refused."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinprune.errors import TaskError
from kinprune.preprocessing import Preprocessing
from kinprune.tasks import decode, load_task
from kinprune.tasks.parquet import split_files

pa = pytest.importorskip("pyarrow", reason="parquet sources need pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="parquet sources need pyarrow")
PLAIN = Preprocessing(image_size=(8, 8))
CLASS_LABEL = {"_type": "ClassLabel", "names": ["ant", "bee", "cow"]}


def encoded(level: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), level, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def images(count: int) -> list[dict[str, Any]]:
    return [{"bytes": encoded(row % 256), "path": None} for row in range(count)]


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, **options: Any) -> Path:
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def plain(path: Path, labels: Sequence[Any], **options: Any) -> Path:
    return write(path, {"image": images(len(labels)), "label": labels}, **options)


def test_declared_names_and_lazy_rows(tmp_path: Path) -> None:
    features = {"picture": {"_type": "Image"}, "kind": CLASS_LABEL}
    columns = {"id": list(range(60)), "picture": images(60), "kind": [row % 3 for row in range(60)]}
    path = write(tmp_path / "zoo.parquet", columns, features, row_group_size=7)
    task = load_task(path, classes=["cow", "ant"], shots=5)
    assert (task.name, task.classes) == ("zoo", ("cow", "ant"))
    assert (len(task.train), len(task.test)) == (10, 8)
    decoded = decode(task, PLAIN)
    for part in (decoded.train, decoded.test):
        rows = part.images[:, 0, 0, 0].long()  # each row's level is its number
        assert torch.equal(torch.tensor([2, 0])[part.labels], rows % 3)
    assert decoded.train.images[:, 0, 0, 0].tolist() == task.train.rows.tolist()


def test_only_the_wanted_row_groups_are_read(tmp_path: Path) -> None:
    path = plain(tmp_path / "x.parquet", [0, 1] * 10 + [2, 3] * 10, row_group_size=20)
    first, other = load_task(path, classes=["0", "1"]), load_task(path, classes=["2", "3"])
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    assert column.path_in_schema == "image.bytes"
    raw = bytearray(path.read_bytes())
    raw[column.dictionary_page_offset : column.data_page_offset] = b"\xff" * (
        column.data_page_offset - column.dictionary_page_offset
    )
    path.write_bytes(raw)
    assert len(decode(first, PLAIN).train) == 16
    with pytest.raises(TaskError, match=r"x\.parquet cannot be read as parquet"):
        decode(other, PLAIN)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    rows = images(6)
    rows[4]["bytes"] = rows[4]["bytes"][:40]
    path = write(tmp_path / "x.parquet", {"image": rows, "label": [0, 1] * 3})
    with pytest.raises(TaskError, match=r"row 4 of .*x\.parquet cannot be read as an image"):
        decode(load_task(path), PLAIN)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, 10, 9], ("9", "10")),
        (["dog", "cat", "dog", "cat"], ("cat", "dog")),
        (pa.array(["dog", "cat", "dog", "cat"]).dictionary_encode(), ("cat", "dog")),
        (pa.array([3, 5, 3, 5], type=pa.uint8()), ("3", "5")),
        ([True, False, True, False], ("False", "True")),
    ],
)
def test_undeclared_labels_name_themselves(tmp_path: Path, labels: Any, classes: tuple[str, ...]) -> None:
    task = load_task(plain(tmp_path / "x.parquet", labels))
    assert task.classes == classes
    named = labels.to_pylist() if isinstance(labels, pa.Array) else labels
    for items in (task.train, task.test):
        assert [str(named[row]) for row in items.rows] == [classes[label] for label in items.labels]


@pytest.mark.parametrize("column", [pa.binary(), pa.large_binary()])
def test_plain_bytes(tmp_path: Path, column: Any) -> None:
    data = {"img": pa.array([encoded(row) for row in range(8)], type=column), "class": [0, 1] * 4}
    decoded = decode(load_task(write(tmp_path / "x.parquet", data)), PLAIN)
    assert sorted(decoded.train.images[:, 0, 0, 0].tolist() + decoded.test.images[:, 0, 0, 0].tolist()) == [*range(8)]


def test_folder_of_shards(tmp_path: Path) -> None:
    for number in range(2):
        plain(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", [0, 1, 0])
    plain(tmp_path / "data" / "test-00000-of-00001.parquet", [1, 0])
    task = load_task(tmp_path)
    assert (len(task.train), len(task.test)) == (6, 2)
    assert sorted(task.train.rows.tolist()) == [*range(6)]
    assert sorted(decode(task, PLAIN).train.images[:, 0, 0, 0].tolist()) == [0, 0, 1, 1, 2, 2]
    assert "row 1 of" in task.train.reader.where(4) and "00001-of" in task.train.reader.where(4)
    assert "train-00001-of-00002.parquet" in task.train.reader.identity(4)
    with pytest.raises(IndexError):
        task.train.reader.where(6)


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["a.parquet", "b.parquet"], ["a.parquet", "b.parquet"], []),
        (["test.parquet", "train.parquet"], ["train.parquet"], ["test.parquet"]),
        (["train-0.parquet", "validation-0.parquet"], ["train-0.parquet"], ["validation-0.parquet"]),
        (["train.parquet", "val.parquet", "test.parquet"], ["train.parquet"], ["test.parquet"]),
        (
            ["default/train/0.parquet", "default/test/0.parquet"],
            ["default/train/0.parquet"],
            ["default/test/0.parquet"],
        ),
        (["cifar_train.parquet", "cifar_test.parquet"], ["cifar_train.parquet"], ["cifar_test.parquet"]),
        (["trainset.parquet", "testset.parquet"], ["trainset.parquet"], ["testset.parquet"]),
        (["train.parquet", "extra.parquet"], ["train.parquet"], []),
        (["contest.parquet", "strain.parquet"], ["contest.parquet", "strain.parquet"], []),
    ],
)
def test_parts_by_name(names: list[str], train: list[str], test: list[str]) -> None:
    assert split_files(names) == (train, test)


def test_columns_are_named_or_refused(tmp_path: Path) -> None:
    two = {"img": images(8), "photo": images(8), "fine_label": [0, 1] * 4, "coarse_label": [0, 1, 1, 0] * 2}
    path = write(tmp_path / "two.parquet", two)
    with pytest.raises(TaskError, match=r"image column may be 'img', 'photo'; choose with image_column='img'"):
        load_task(path)
    with pytest.raises(TaskError, match="label column may be 'fine_label', 'coarse_label'; choose with label_column="):
        load_task(path, image_column="img")
    assert load_task(path, image_column="photo", label_column="coarse_label").classes == ("0", "1")
    with pytest.raises(TaskError, match="no column 'fine_labl' for the label; did you mean 'fine_label'"):
        load_task(path, image_column="img", label_column="fine_labl")
    with pytest.raises(TaskError, match="cannot be both"):
        load_task(path, image_column="img", label_column="img")
    with pytest.raises(TaskError, match="'fine_label' is of type int64; expected encoded images"):
        load_task(path, image_column="fine_label", label_column="coarse_label")
    with pytest.raises(TaskError, match=r"'photo' is of type struct.*expected numbers or text"):
        load_task(path, image_column="img", label_column="photo")
    nameless = write(tmp_path / "nameless.parquet", {"stuff": [1, 2], "thing": [0.5, 1.5]})
    with pytest.raises(TaskError, match="no image column is recognised among 'stuff', 'thing'; name it with image_col"):
        load_task(nameless)


def test_bad_labels_are_refused(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": CLASS_LABEL}
    with pytest.raises(TaskError, match=r"row 2 of .*has no label"):
        load_task(plain(tmp_path / "null.parquet", [0, 1, None, 1]))
    with pytest.raises(TaskError, match=r"row 3 of .*has the label -1; expected 0 to 2.*unlabelled"):
        load_task(plain(tmp_path / "minus.parquet", [0, 1, 2, -1], features=features))
    with pytest.raises(TaskError, match="has the label 3"):
        load_task(plain(tmp_path / "over.parquet", [0, 1, 2, 3], features=features))
    with pytest.raises(TaskError, match="declares class names but is string"):
        load_task(plain(tmp_path / "text.parquet", ["a", "b"], features=features))
    twice = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b", "a"]}}
    with pytest.raises(TaskError, match="'a' is named more than once"):
        load_task(plain(tmp_path / "twice.parquet", [0, 1, 2], features=twice))
    with pytest.raises(TaskError, match="class 'cow' is empty"):
        load_task(plain(tmp_path / "gap.parquet", [0, 1, 0, 1], features=features))


def test_files_that_differ_are_refused(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": CLASS_LABEL}
    plain(tmp_path / "names" / "train.parquet", [0, 1, 2], features=features)
    plain(tmp_path / "names" / "test.parquet", [0, 1, 2])
    with pytest.raises(TaskError, match="differ in their columns or class names"):
        load_task(tmp_path / "names")
    plain(tmp_path / "kinds" / "train.parquet", [0, 1])
    plain(tmp_path / "kinds" / "test.parquet", ["0", "1"])
    with pytest.raises(TaskError, match="numbers in some files and text in others"):
        load_task(tmp_path / "kinds")
    plain(tmp_path / "tests" / "test-0.parquet", [0, 1])
    plain(tmp_path / "tests" / "test-1.parquet", [0, 1])
    with pytest.raises(TaskError, match="are test files, but no file is named train"):
        load_task(tmp_path / "tests")


def test_damaged_and_changed_files(tmp_path: Path) -> None:
    path = plain(tmp_path / "x.parquet", [0, 1] * 4)
    task = load_task(path)
    plain(path, [0, 1] * 5)
    with pytest.raises(TaskError, match="has changed since the task was loaded: 10 rows, not 8"):
        decode(task, PLAIN)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TaskError, match=r"x\.parquet cannot be read as parquet"):
        load_task(path)


def test_a_row_without_its_image(tmp_path: Path) -> None:
    rows = images(6)
    rows[4] = {"bytes": None, "path": "elsewhere.png"}
    path = write(tmp_path / "x.parquet", {"image": rows, "label": [0, 1] * 3})
    with pytest.raises(TaskError, match=r"row 4 of .* holds no image in 'image.bytes'"):
        decode(load_task(path), PLAIN)


def test_metadata_that_is_no_json_is_not_needed(tmp_path: Path) -> None:
    table = pa.table({"image": images(4), "label": [0, 1, 0, 1]}).replace_schema_metadata({"huggingface": "{"})
    pq.write_table(table, tmp_path / "x.parquet")
    assert load_task(tmp_path / "x.parquet").classes == ("0", "1")


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plain(tmp_path / "x.parquet", [0, 1, 0, 1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TaskError, match=r"needs the package 'pyarrow'.*pip install pyarrow"):
        load_task(path)


def test_split_depends_on_rows_alone(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    labels = [row % 4 for row in range(40)]
    whole = load_task(plain(tmp_path / "a.parquet", labels))
    renamed = load_task(plain(tmp_path / "b.parquet", labels, compression="gzip"))
    assert whole.test.rows.tolist() == renamed.test.rows.tolist()
    assert whole.digest != renamed.digest
