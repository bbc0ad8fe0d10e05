"""Image folders: what is a class, what is a part, and what is refused."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from kinprune.errors import TaskError
from kinprune.tasks import list_images, load_task
from kinprune.tasks.task import Items

Make = Callable[..., Path]


def keys(items: Items) -> list[str]:
    return sorted(items.reader.key(row) for row in items.rows)


def test_class_folders_are_split(tmp_path: Path, make_folder: Make) -> None:
    task = load_task(make_folder(tmp_path / "pets", ["dog", "cat", "bird"], 10))
    assert task.name == "pets"
    assert task.classes == ("bird", "cat", "dog")
    assert (len(task.train), len(task.test)) == (24, 6)
    assert task.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    for row, label in zip(task.train.rows, task.train.labels, strict=True):
        assert Path(task.train.reader.where(row)).parent.name == task.classes[label]


def test_loading_decodes_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.jpg").write_bytes(b"not an image")
    assert len(load_task(tmp_path).train) == 4


@pytest.mark.parametrize("test_name", ["test", "val", "valid", "Validation"])
def test_own_parts_are_kept(tmp_path: Path, make_folder: Make, test_name: str) -> None:
    make_folder(tmp_path / "Train", ["a", "b"], 4)
    make_folder(tmp_path / test_name, ["a", "b"], 3)
    task = load_task(tmp_path, shots=2)
    assert (len(task.train), len(task.test)) == (4, 6)
    assert {Path(task.test.reader.where(row)).parts[-3] for row in task.test.rows} == {test_name}


def test_test_comes_before_val(tmp_path: Path, make_folder: Make) -> None:
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        make_folder(tmp_path / part, ["a", "b"], count)
    assert len(load_task(tmp_path).test) == 6


def test_train_alone_is_split(tmp_path: Path, make_folder: Make) -> None:
    make_folder(tmp_path / "train", ["a", "b"], 5)
    task = load_task(tmp_path)
    assert (task.classes, len(task.train), len(task.test)) == (("a", "b"), 8, 2)


def test_a_class_may_be_called_train(tmp_path: Path, make_folder: Make) -> None:
    assert load_task(make_folder(tmp_path, ["bus", "train", "test"], 3)).classes == ("bus", "test", "train")


def test_hidden_and_other_files_are_ignored(tmp_path: Path, make_folder: Make) -> None:
    root = make_folder(tmp_path, ["a", "b"], 4)
    before = load_task(root)
    (root / ".git").mkdir()
    (root / "__MACOSX").mkdir()
    shutil.copy(root / "a" / "0000.png", root / "a" / "._0000.png")
    (root / "a" / "Thumbs.db").write_bytes(b"x")
    (root / "README.md").write_text("read me")
    after = load_task(root)
    assert after.digest == before.digest
    assert len(list_images(root)) == 8


def test_nested_folders_and_upper_case_suffixes_count(tmp_path: Path, make_folder: Make) -> None:
    root = make_folder(tmp_path, ["a", "b"], 2)
    (root / "a" / "more").mkdir()
    (root / "a" / "0001.png").rename(root / "a" / "more" / "0001.PNG")
    task = load_task(root)
    assert len(task.train) + len(task.test) == 4
    assert "more/0001.PNG" in keys(task.train) + keys(task.test)


def test_a_link_to_a_folder_above_ends(tmp_path: Path, make_folder: Make) -> None:
    root = make_folder(tmp_path, ["a", "b"], 2)
    (root / "a" / "again").symlink_to(root / "a", target_is_directory=True)
    task = load_task(root)
    assert len(task.train) + len(task.test) == 4


def test_accents_are_composed(tmp_path: Path, make_folder: Make) -> None:
    composed, decomposed = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    first = load_task(make_folder(tmp_path / "1", [composed, "tea"], 6))
    root = make_folder(tmp_path / "2", [composed, "tea"], 6)
    (root / composed).rename(root / decomposed)
    second = load_task(root)
    assert second.classes == first.classes
    assert keys(second.test) == keys(first.test)
    make_folder(root, [composed], 6)
    with pytest.raises(TaskError, match="named more than once"):
        load_task(root)


def test_names_that_are_no_utf8(tmp_path: Path, make_folder: Make) -> None:
    root = make_folder(tmp_path, ["a", "b"], 3)
    os.rename(root / "a" / "0000.png", os.fsencode(root / "a") + b"/\xff\xfe.png")
    task = load_task(root)
    assert len(task.train) + len(task.test) == 6
    assert len(task.digest) == 64


def test_digest_tells_data_apart_and_not_places(tmp_path: Path, make_folder: Make) -> None:
    first = load_task(make_folder(tmp_path / "here", ["a", "b"], 5))
    assert load_task(make_folder(tmp_path / "there", ["a", "b"], 5)).digest == first.digest
    assert load_task(tmp_path / "here", classes=["b", "a"]).digest == first.digest
    assert load_task(tmp_path / "here", seed=1).digest != first.digest
    assert load_task(tmp_path / "here", shots=2).digest != first.digest
    changed = next((tmp_path / "there" / "a").iterdir())
    changed.write_bytes(changed.read_bytes() + b"\0")
    assert load_task(tmp_path / "there").digest != first.digest


def test_refused_folders(tmp_path: Path, make_folder: Make) -> None:
    with pytest.raises(TaskError, match="nowhere does not exist"):
        load_task(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match="holds no images and no parquet"):
        load_task(tmp_path / "empty")
    for name in ("a", "b"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "notes.txt").write_text("no image")
    with pytest.raises(TaskError, match="texts holds no images"):
        load_task(tmp_path / "texts")
    flat = make_folder(tmp_path / "flat", ["."], 3)
    with pytest.raises(TaskError, match="holds images but no class folders"):
        load_task(flat)
    archive = tmp_path / "pets.zip"
    archive.write_bytes(b"PK")
    with pytest.raises(TaskError, match=r"pets\.zip is a file of unknown type '\.zip'.*unpack"):
        load_task(archive)
    with pytest.raises(TaskError, match="at least two"):
        load_task(make_folder(tmp_path / "single", ["only"], 3))


def test_refused_classes(tmp_path: Path, make_folder: Make) -> None:
    root = make_folder(tmp_path, ["cat", "dog"], 3)
    (root / "empty").mkdir()
    with pytest.raises(TaskError, match="class 'empty' is empty"):
        load_task(root)
    assert load_task(root, classes=["dog", "cat"]).classes == ("dog", "cat")
    assert load_task(root, classes="dog, cat").classes == ("dog", "cat")
    make_folder(root, ["lonely"], 1)
    with pytest.raises(TaskError, match=r"class 'lonely' has one image \(.*0000\.png\)"):
        load_task(root, classes=["cat", "lonely"])
    with pytest.raises(TaskError, match="there is no class 'Dgo'; did you mean 'dog'"):
        load_task(root, classes=["cat", "Dgo"])
    with pytest.raises(TaskError, match="known are 'cat', 'dog'"):
        load_task(root, classes=["cat", "zzz"])
    with pytest.raises(TaskError, match="'cat' is named more than once"):
        load_task(root, classes=["cat", "cat"])
    with pytest.raises(TaskError, match="at least two"):
        load_task(root, classes=["cat"])
    with pytest.raises(TaskError, match="1 is not a class name"):
        load_task(root, classes=[1, 2])  # type: ignore[list-item]


def test_refused_parts(tmp_path: Path, make_folder: Make) -> None:
    make_folder(tmp_path / "train", ["a", "b"], 3)
    make_folder(tmp_path / "test", ["a", "b", "c"], 2)
    with pytest.raises(TaskError, match="'c' is in the test part but not in the training part"):
        load_task(tmp_path)
    assert load_task(tmp_path, classes=["a", "b"]).classes == ("a", "b")
    with pytest.raises(TaskError, match="'c' has no image in the training part"):
        load_task(tmp_path, classes=["a", "c"])
    make_folder(tmp_path / "train", ["d"], 2)
    with pytest.raises(TaskError, match="'d' has no image in the test part"):
        load_task(tmp_path, classes=["a", "d"])


def test_refused_unlabelled_or_lone_test(tmp_path: Path, make_folder: Make) -> None:
    make_folder(tmp_path / "train", ["a", "b"], 3)
    make_folder(tmp_path, ["test"], 2)
    with pytest.raises(TaskError, match="test holds images but no class folders"):
        load_task(tmp_path)
    make_folder(tmp_path / "val", ["a", "b"], 1)
    assert len(load_task(tmp_path).test) == 2
    make_folder(tmp_path / "lone" / "test", ["a", "b"], 2)
    with pytest.raises(TaskError, match="no train/"):
        load_task(tmp_path / "lone")


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"shots": 0}, "shots=0"),
        ({"shots": 1.5}, r"shots=1\.5"),
        ({"shots": True}, "shots=True"),
        ({"test_fraction": 0}, "test_fraction=0"),
        ({"test_fraction": 1.0}, r"test_fraction=1\.0"),
        ({"test_fraction": float("nan")}, "test_fraction=nan"),
        ({"test_fraction": "0.2"}, "test_fraction='0.2'"),
        ({"seed": 0.5}, r"seed=0\.5"),
        ({"image_column": "img"}, "has no columns"),
    ],
)
def test_refused_choices(tmp_path: Path, make_folder: Make, option: dict[str, object], match: str) -> None:
    with pytest.raises(TaskError, match=match):
        load_task(make_folder(tmp_path, ["a", "b"], 2), **option)  # type: ignore[arg-type]
