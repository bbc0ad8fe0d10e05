"""The one door to a task: a source by its path or address."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kinprune.errors import TaskError
from kinprune.tasks import hub, torchvision_sets
from kinprune.tasks.folders import read_folder
from kinprune.tasks.parquet import read_parquet
from kinprune.tasks.splitting import Choice, take_task
from kinprune.tasks.task import Labelled, Task

SOURCES = "an image folder, a parquet file or a folder of them, hf://owner/name, or torchvision:NAME?root=DIR"


def load_task(
    source: str | Path,
    *,
    classes: Sequence[str] | str | None = None,
    shots: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Task:
    """Load a task without decoding its images.

    ``source``: a folder with a sub-folder per class, or with ``train/`` and ``test/`` (or ``val/``) of those; a
    parquet file, or a folder of parquet files (``train*``, ``test*``); ``hf://owner/name[/config][@revision]``;
    ``torchvision:NAME?root=DIR``. ``classes`` (a list, or names joined by commas) takes some classes, in that
    order; labels are indices into the chosen ones. ``shots`` caps the training images of each class; fewer shots
    are a part of more. A source without a test part is split, ``test_fraction`` of each class going to the test
    part; which images is decided by ``seed`` and by nothing outside the class. ``image_column`` and
    ``label_column`` are for parquet, where the schema leaves a doubt.

    Raises TaskError, before anything is decoded, where the source or the choice cannot make a task.
    """
    choice = Choice(classes, shots, test_fraction, seed)
    return take_task(open_source(source, name=name, image_column=image_column, label_column=label_column), choice)


def open_source(
    source: str | Path, *, name: str | None = None, image_column: str | None = None, label_column: str | None = None
) -> Labelled:
    """Find all labelled images of a source, as ``load_task`` does, decoding none.

    Raises TaskError where the source has none.
    """
    text = str(source)
    if text.startswith(torchvision_sets.SCHEME):
        _refuse_columns(text, image_column, label_column)
        found, train, test = torchvision_sets.make_datasets(text)
        return torchvision_sets.read_torchvision(train, test, name=name or found.lower())
    if text.startswith(hub.SCHEME):
        root, names = hub.fetch(text)
        name = name or hub.parse_address(text).repo.split("/")[1]
        return Labelled(name, *read_parquet(root, names, image=image_column, label=label_column))
    path = Path(source).expanduser()
    if not path.exists():
        raise TaskError(f"{path} does not exist; expected {SOURCES}")
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise TaskError(f"{path} is a file of unknown type {path.suffix!r}; expected {SOURCES} (unpack archives)")
        parts = read_parquet(path.parent, [path.name], image=image_column, label=label_column)
        return Labelled(name or path.stem, *parts)
    return _open_folder(path, name or path.resolve().name, image_column, label_column)


def _open_folder(path: Path, name: str, image: str | None, label: str | None) -> Labelled:
    found = None if _parquet(path, "*") else read_folder(path)
    if found is not None:
        _refuse_columns(str(path), image, label)
        return Labelled(name, *found)
    names = _parquet(path, "*") or _parquet(path, "**/*")
    if not names:
        raise TaskError(f"{path} holds no images and no parquet files; expected {SOURCES}")
    return Labelled(name, *read_parquet(path, names, image=image, label=label))


def _parquet(folder: Path, pattern: str) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.glob(pattern)
        if path.suffix.lower() == ".parquet" and path.is_file() and not path.name.startswith(".")
    )


def _refuse_columns(source: str, image: str | None, label: str | None) -> None:
    if image is not None or label is not None:
        raise TaskError(f"{source} has no columns: image_column and label_column are for parquet and hf:// sources")
