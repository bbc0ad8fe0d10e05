from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinprune.devices.device import Device, Profile, check_device, read_device, this_machine, write_device
from kinprune.errors import DeviceError


def test_a_device_comes_back_as_it_was_written(device: Device, tmp_path: Path) -> None:
    write_device(device, tmp_path / "pi.json")
    assert read_device(tmp_path / "pi.json") == device
    assert [path.name for path in tmp_path.iterdir()] == ["pi.json"]


def test_a_device_that_cannot_be_timed_is_only_limits(tmp_path: Path) -> None:
    device = Device("mcu", {"weight_bytes": 262_144, "peak_memory_bytes": 524_288.0}, "int8")
    write_device(device, tmp_path / "mcu.json")
    found = read_device(tmp_path / "mcu.json")
    assert found == device
    assert found.profile("int8") is None


@pytest.mark.parametrize("place", range(0, 2000, 97))
def test_no_byte_changes_unseen(device: Device, tmp_path: Path, place: int) -> None:
    path = tmp_path / "pi.json"
    write_device(device, path)
    raw = bytearray(path.read_bytes())
    place = place * len(raw) // 2000
    raw[place] = raw[place] ^ 1
    path.write_bytes(raw)
    try:
        found = read_device(path)
    except DeviceError:
        return
    assert found == device  # white space between values, which means nothing


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(device: Device, tmp_path: Path, share: float) -> None:
    path = tmp_path / "pi.json"
    write_device(device, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DeviceError, match="damaged"):
        read_device(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [("[]", "describes no device"), ("{}", "describes no device"), ('{"kinprune_device": 99}', "upgrade Kinprune")],
)
def test_other_files_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "pi.json").write_text(text)
    with pytest.raises(DeviceError, match=told):
        read_device(tmp_path / "pi.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"nowhere\.json cannot be read"):
        read_device(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": ""}, "cannot be called"),
        ({"name": "../up"}, "cannot be called"),
        ({"precision": "int4"}, "there is no precision 'int4'"),
        ({"limits": {"speed": 3}}, "limits 'speed'"),
        ({"limits": {"latency_ms": -1}}, "is -1, expected a number above 0"),
        ({"limits": {"latency_ms": float("nan")}}, "is nan"),
        ({"limits": {"macs": True}}, "is True"),
    ],
)
def test_a_device_that_contradicts_itself_is_refused(device: Device, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(DeviceError, match=told):
        check_device(replace(device, **changed))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"precision": "int4"}, "unknown precision"),
        ({"threads": 0}, "threads, batch or pixels of 0"),
        ({"milliseconds": (1.0,)}, "not as many models as latencies"),
        ({"counts": ((1,),), "milliseconds": (1.0,)}, "fewer than 20"),
    ],
)
def test_a_profile_that_contradicts_itself_is_refused(profile: Profile, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(DeviceError, match=told):
        check_device(Device("pi", profiles=(replace(profile, **changed),)))


def test_latencies_must_be_times(profile: Profile) -> None:
    for bad in (0.0, -1.0, float("inf"), 1):
        changed = replace(profile, milliseconds=(bad, *profile.milliseconds[1:]))
        with pytest.raises(DeviceError, match="no time"):
            check_device(Device("pi", profiles=(changed,)))


def test_a_new_profile_takes_the_place_of_one_of_its_precision(device: Device, profile: Profile) -> None:
    newer = replace(profile, threads=2)
    eight = replace(profile, precision="int8")
    found = device.with_profile(newer).with_profile(eight)
    assert [one.precision for one in found.profiles] == ["fp32", "int8"]
    assert found.profile("fp32") == newer


def test_what_cannot_be_written_leaves_nothing(device: Device, tmp_path: Path) -> None:
    (tmp_path / "pi.json").mkdir()
    with pytest.raises(DeviceError, match="cannot be written"):
        write_device(device, tmp_path / "pi.json")
    assert [path.name for path in tmp_path.iterdir()] == ["pi.json"]


def test_this_machine_tells_what_it_is() -> None:
    found = this_machine()
    assert found["system"] == platform.system()
    assert found["processor"]
    assert json.loads(json.dumps(found)) == found
