"""A record as a file: what is written comes back and goes into a bank; what is not whole is refused by name."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kinprune.backbones import Backbone, load_backbone
from kinprune.bank import Bank, Header, Record, create_bank, exchange, read_record, verify, write_record
from kinprune.calibration import Probe
from kinprune.errors import BankError
from kinprune.units import find_units

Make = Callable[..., Record]


def assert_equal(found: Record, put: Record) -> None:
    """The same record in the precision that a bank keeps, bit for bit."""
    assert (found.key, found.name, found.classes) == (put.key, put.name, put.classes)
    assert found.accuracy == put.accuracy and found.details == put.details and found.mask == put.mask
    assert found.ranking.dtype == np.int64 and np.array_equal(found.ranking, put.ranking)
    assert found.scores.dtype == np.float16 and found.scores.tobytes() == put.scores.tobytes()
    for name in ("weights", "means"):
        half = getattr(put.probe, name).astype(np.float16).astype(np.float32)
        assert getattr(found.probe, name).tobytes() == half.tobytes(), name
    assert found.probe.biases.tobytes() == put.probe.biases.tobytes()
    assert np.array_equal(found.probe.counts, put.probe.counts)
    assert found.tensors.keys() == put.tensors.keys()
    for name, tensor in put.tensors.items():
        expected = tensor.half() if tensor.dtype == torch.float32 and tensor.half().isfinite().all() else tensor
        assert found.tensors[name].dtype == expected.dtype and torch.equal(found.tensors[name], expected), name


@pytest.fixture
def header(sqlite_bank: Bank) -> Header:
    return sqlite_bank.header


@pytest.fixture
def written(tmp_path: Path, header: Header, make_record: Make) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    return write_record(make_record(0), header, folder / "record.safetensors")


def test_a_record_goes_through_a_file_into_a_bank(
    bank: Bank, make_record: Make, tmp_path: Path, backbone: Backbone
) -> None:
    put = make_record(3, name="Apfel 苹果", classes=("a", "ä\n", "'\"\\ "))
    put = replace(put, tensors={**put.tensors, "classifier.bias": torch.tensor([1e6, 1, 2])})  # half cannot hold it
    read = read_record(write_record(put, bank.header, tmp_path / "one.safetensors"), bank.header)
    assert_equal(read, put)
    assert bank.add(read) is True and bank.add(read) is False
    (entry,) = bank.entries()
    assert_equal(bank.record(entry), put)
    assert verify(bank).whole
    # It is in the bank just as if it had never been in a file, and what the bank has can be written again.
    direct = create_bank(tmp_path / "direct.db", backbone, find_units(backbone.model, (16, 16), head=backbone.head))
    direct.add(put)
    assert direct.entries()[0].weights == entry.weights
    again = write_record(bank.record(entry), bank.header, tmp_path / "two.safetensors")
    assert again.read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_anyone_can_look_into_the_file(written: Path, header: Header, make_record: Make) -> None:
    put = make_record(0)
    with safe_open(written, "pt") as file:
        (text,) = file.metadata().values()
        assert {name.partition("/")[0] for name in file.keys()} == {"units", "probe", "weights"}  # noqa: SIM118
        assert file.get_tensor("units").dtype == torch.uint8 == file.get_tensor("probe").dtype
    said = json.loads(text)
    assert (said["version"], said["key"], said["name"], said["classes"]) == (1, put.key, put.name, list(put.classes))
    assert said["accuracy"] == vars(put.accuracy) and said["details"] == put.details
    assert (said["backbone"], said["space"]) == (header.backbone, header.space)


def test_strange_tensors_come_back(header: Header, make_record: Make, tmp_path: Path) -> None:
    tensors = {
        "units": torch.arange(6.0).reshape(2, 3).t(),
        "probe": torch.tensor(7),
        "weights/x": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "bf": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    }
    tensors["twin"] = tensors["units"]
    put = make_record(0, tensors=tensors)
    assert_equal(read_record(write_record(put, header, tmp_path / "r.safetensors"), header), put)


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(written: Path, header: Header, make_record: Make) -> None:
    content, put, harmless = written.read_bytes(), make_record(0), 0
    generator = np.random.default_rng(0)
    text = 8 + int.from_bytes(content[:8], "little")
    places = {*range(8), *generator.integers(8, text, 400).tolist(), *generator.integers(text, len(content), 300)}
    for place in sorted(int(place) for place in places):
        written.write_bytes(flipped(content, place, int(generator.integers(8))))
        try:
            assert_equal(read_record(written, header), put)
        except BankError as error:
            assert str(written) in str(error)
        else:
            harmless += 1
            assert place < text, place  # no byte of a number is harmless
    assert harmless < 5


@pytest.mark.parametrize("share", [0, 1e-4, 0.01, 0.3, 0.9, 1 - 1e-9])
def test_a_file_that_is_cut_off(written: Path, header: Header, share: float) -> None:
    content = written.read_bytes()
    written.write_bytes(content[: min(round(share * len(content)), len(content) - 1)])
    with pytest.raises(BankError, match=r"record\.safetensors is cut off after .* bytes: copy it again"):
        read_record(written, header)


def change(path: Path, alter: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], *, seal: bool) -> None:
    """Write a file again with other content, and a seal that fits it or the old one."""
    with safe_open(path, "pt") as file:
        ((entry, text),) = file.metadata().items()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said = json.loads(text)
    alter(said, tensors)
    if seal:
        said["seal"] = exchange._seal({name: value for name, value in said.items() if name != "seal"}, tensors)
    save_file(tensors, path, {entry: json.dumps(said)})


@pytest.mark.parametrize(
    "name", ["key", "name", "classes", "accuracy", "details", "space", "backbone", "about", "seal"]
)
def test_what_the_file_says_is_sealed(written: Path, header: Header, name: str) -> None:
    change(written, lambda said, _: said.update({name: "other"}), seal=False)
    with pytest.raises(BankError, match="altered or damaged, it is not what its seal says"):
        read_record(written, header)
    change(written, lambda said, _: said.pop(name), seal=False)
    with pytest.raises(BankError, match="altered or damaged"):
        read_record(written, header)


def swap(tensors: dict[str, torch.Tensor]) -> None:
    first, second = "weights/norm1.weight", "weights/norm1.bias"
    tensors[first], tensors[second] = tensors[second], tensors[first]


@pytest.mark.parametrize(
    "alter",
    [
        swap,
        lambda tensors: tensors.pop("weights/first.weight"),
        lambda tensors: tensors.update({"weights/new": torch.zeros(1)}),
        lambda tensors: tensors.update({"units": tensors["units"].roll(1)}),
        lambda tensors: tensors.update({"weights/first.weight": tensors["weights/first.weight"].view(torch.int16)}),
        lambda tensors: tensors.update({"weights/first.weight": tensors["weights/first.weight"].flatten()}),
    ],
    ids=["swapped", "removed", "added", "rolled", "type", "shape"],
)
def test_tensors_are_sealed(written: Path, header: Header, alter: Callable[[dict[str, torch.Tensor]], None]) -> None:
    change(written, lambda _, tensors: alter(tensors), seal=False)
    with pytest.raises(BankError, match="altered or damaged"):
        read_record(written, header)


def test_what_is_only_written_again_is_read(written: Path, header: Header, make_record: Make) -> None:
    """It is not the writing again that the tests around this see refused."""
    change(written, lambda said, tensors: None, seal=True)
    assert_equal(read_record(written, header), make_record(0))


@pytest.mark.parametrize("alter", [{"classes": 3}, {"classes": ["a"]}, {"accuracy": {"dense": 1}}, {"details": None}])
def test_a_seal_alone_makes_no_record(written: Path, header: Header, alter: dict[str, Any]) -> None:
    change(written, lambda said, _: said.update(alter), seal=True)
    with pytest.raises(BankError, match=r"record\.safetensors (is sealed, but what it holds|cannot be used)"):
        read_record(written, header)


def test_a_newer_layout(written: Path, header: Header) -> None:
    change(written, lambda said, _: said.update(version=2), seal=True)
    with pytest.raises(BankError, match="has the layout 2, expected 1: it was made by a newer Kinprune, upgrade"):
        read_record(written, header)


def test_another_model_is_named(written: Path, header: Header, tmp_path: Path) -> None:
    other = load_backbone("test_resnet", num_classes=3, random=True, image_size=32)
    its = create_bank(tmp_path / "other.db", other, find_units(other.model, (32, 32), head=other.head)).header
    with pytest.raises(BankError, match="another backbone") as told:
        read_record(written, its)
    assert "about tiny_net:tiny at 16 x 16 pixels without the residual stream" in str(told.value)
    assert "the bank about test_resnet at 32 x 32 pixels" in str(told.value)
    with pytest.raises(BankError, match="another backbone"):
        read_record(written, replace(header, backbone="0" * 64))  # the same model with other weights
    with pytest.raises(BankError, match=r"another unit space.*with the residual stream.*unit space 000000000000\)"):
        read_record(written, replace(header, space="0" * 64, stream=True))


def test_other_files(tmp_path: Path, header: Header) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(BankError, match=r"file\.safetensors cannot be read .*give the record\.safetensors of adapt"):
        read_record(path, header)
    with pytest.raises(BankError, match="cannot be read"):
        read_record(tmp_path, header)
    deep = b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"
    for content in (b"a text that is long enough to be no header", struct.pack("<Q", 2) + b"[]", b"\x02" + bytes(20)):
        path.write_bytes(content)
        with pytest.raises(BankError, match="no safetensors file"):
            read_record(path, header)
    path.write_bytes(struct.pack("<Q", len(deep)) + deep)
    with pytest.raises(BankError, match="no safetensors file"):
        read_record(path, header)
    for metadata in (None, {"format": "pt"}):
        save_file({"x": torch.zeros(2)}, path, metadata)
        with pytest.raises(BankError, match="but holds no record of a bank"):
            read_record(path, header)
    for text in ("", "[]", "{}", "[" * 100_000, '{"version": "x"}'):
        save_file({"x": torch.zeros(2)}, path, {"kinprune-record": text})
        with pytest.raises(BankError, match="altered or damaged"):
            read_record(path, header)


def test_what_cannot_be_written_leaves_nothing(
    written: Path, header: Header, make_record: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, record = written.read_bytes(), make_record(1)
    large = Probe(record.probe.weights * 1e6, record.probe.biases, record.probe.means, record.probe.counts)
    for wrong, said in (
        (replace(record, tensors={}), "no weights"),
        (replace(record, details={"x": float("nan")}), "no JSON"),
        (replace(record, probe=large), "half precision"),
    ):
        with pytest.raises(BankError, match=said):
            write_record(wrong, header, written)
    for place in (tmp_path / "nowhere" / "x.safetensors", written / "x.safetensors", written.parent):
        with pytest.raises(BankError, match="cannot be written"):
            write_record(record, header, place)
    calls: list[Path] = []

    def broken(source: Path, target: Path) -> None:
        calls.append(source)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(KeyboardInterrupt):
            write_record(record, header, written)
    assert calls[0].parent == written.parent and list(written.parent.iterdir()) == [written]
    assert written.read_bytes() == before
    assert_equal(read_record(write_record(record, header, written), header), record)
