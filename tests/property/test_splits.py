"""What holds of every split: stratified, nested in shots, and untouched by order and by other classes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kinprune.tasks.folders import FileReader, ImageFile
from kinprune.tasks.splitting import Choice, take_task
from kinprune.tasks.task import Labelled, Pool, Task

CLASS_NAMES = st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=5, unique=True)
SEEDS = st.integers(-5, 2**40)
FRACTIONS = st.floats(0.001, 0.999)


@st.composite
def folders(draw: st.DrawFn) -> dict[str, list[str]]:
    """Class names to the keys of their images, in a drawn order."""
    names = draw(CLASS_NAMES)
    sizes = {name: draw(st.integers(2, 25)) for name in names}
    return {name: draw(st.permutations([f"{number}.png" for number in range(size)])) for name, size in sizes.items()}


def task_of(keys: dict[str, list[str]], choice: Choice) -> Task:
    from pathlib import Path

    files: list[ImageFile] = []
    rows: dict[str, np.ndarray] = {}
    for name, found in keys.items():
        rows[name] = np.arange(len(files), len(files) + len(found))
        files += [ImageFile(Path(name) / key, key, 1) for key in found]
    return take_task(Labelled("drawn", tuple(keys), Pool(FileReader(tuple(files)), rows), None), choice)


def keys_of(task: Task, part: str) -> dict[str, list[str]]:
    items = getattr(task, part)
    found: dict[str, list[str]] = {name: [] for name in task.classes}
    for row, label in zip(items.rows, items.labels, strict=True):
        found[task.classes[label]].append(items.reader.key(row))
    return found


@given(folders(), FRACTIONS, SEEDS)
def test_every_image_is_in_one_part_and_every_class_in_both(
    keys: dict[str, list[str]], fraction: float, seed: int
) -> None:
    task = task_of(keys, Choice(test_fraction=fraction, seed=seed))
    train, test = keys_of(task, "train"), keys_of(task, "test")
    for name, found in keys.items():
        assert sorted(train[name] + test[name]) == sorted(found)
        assert train[name] and test[name]
        assert abs(len(test[name]) - fraction * len(found)) <= 0.5 or len(test[name]) in (1, len(found) - 1)


@given(folders(), FRACTIONS, SEEDS, st.randoms(use_true_random=False))
def test_neither_order_of_files_nor_of_classes_matters(
    keys: dict[str, list[str]], fraction: float, seed: int, random
) -> None:
    choice = Choice(test_fraction=fraction, seed=seed)
    shuffled = {name: random.sample(keys[name], len(keys[name])) for name in random.sample(list(keys), len(keys))}
    first, second = task_of(keys, choice), task_of(shuffled, choice)
    assert keys_of(first, "train") == keys_of(second, "train")
    assert keys_of(first, "test") == keys_of(second, "test")
    assert first.digest == second.digest


@given(folders(), FRACTIONS, SEEDS, st.data())
def test_dropping_classes_changes_no_other_class(
    keys: dict[str, list[str]], fraction: float, seed: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(sorted(keys)), min_size=2, unique=True))
    whole = task_of(keys, Choice(test_fraction=fraction, seed=seed))
    by_choice = task_of(keys, Choice(classes=chosen, test_fraction=fraction, seed=seed))
    by_absence = task_of({name: keys[name] for name in chosen}, Choice(test_fraction=fraction, seed=seed))
    assert by_choice.classes == tuple(chosen)
    for part in ("train", "test"):
        expected = {name: keys_of(whole, part)[name] for name in chosen}
        assert keys_of(by_choice, part) == keys_of(by_absence, part) == expected


@given(folders(), st.integers(1, 30), st.integers(1, 30), SEEDS)
def test_fewer_shots_are_the_start_of_more_and_leave_the_test_part_alone(
    keys: dict[str, list[str]], one: int, other: int, seed: int
) -> None:
    fewer, more = sorted((one, other))
    whole = task_of(keys, Choice(seed=seed))
    few, many = task_of(keys, Choice(shots=fewer, seed=seed)), task_of(keys, Choice(shots=more, seed=seed))
    for name, found in keys_of(whole, "train").items():
        assert keys_of(many, "train")[name] == found[:more]
        assert keys_of(few, "train")[name] == found[:fewer]
    assert keys_of(few, "test") == keys_of(many, "test") == keys_of(whole, "test")


@given(folders(), SEEDS)
@settings(max_examples=50)
def test_an_added_image_moves_at_most_one_other(keys: dict[str, list[str]], seed: int) -> None:
    grown = {name: [*found, "new.png"] for name, found in keys.items()}
    before, after = (
        keys_of(task_of(keys, Choice(seed=seed)), "test"),
        keys_of(task_of(grown, Choice(seed=seed)), "test"),
    )
    for name in keys:
        assert len(set(before[name]) ^ (set(after[name]) - {"new.png"})) <= 1


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_the_seed_decides(seed: int) -> None:
    keys = {name: [f"{number}.png" for number in range(200)] for name in ("a", "b")}
    first, second = (task_of(keys, Choice(seed=one)) for one in (seed, seed + 1))
    assert keys_of(first, "test") != keys_of(second, "test")
    assert keys_of(first, "test")["a"] != keys_of(first, "test")["b"]
