"""Devices on the command line: timed here or by a kit, their limits set, and models made for them."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import kinprune as kp
from kinprune.building import Source, build, sample_sources
from kinprune.devices.device import read_device, write_device

PLAN = kp.Plan(kp.Budget(keep=0.3), rounds=1, score_images=16, recipe=kp.Recipe(steps=1, batch_size=8))
QUICK = ("--neighbours", "2", "--steps", "1", "--batch-size", "8", "--inherit", "average", "--blend", "0", "--json")


@dataclass(frozen=True)
class Site:
    """A bank, a task it has not seen, and this machine's profile for its backbone."""

    bank: Path
    photos: Path
    here: Path


@pytest.fixture(scope="module")
def site(
    make_folder: Callable[..., Path], kinprune: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Site:
    root = tmp_path_factory.mktemp("site")
    known = make_folder(root / "known", ("ant", "bat", "cow"), 8, 36)
    photos = make_folder(root / "photos", ("apple", "pear"), 20, 36)
    backbone = kp.load_backbone("test_resnet", num_classes=2, random=True, image_size=32)
    space = kp.find_units(backbone.model, (32, 32), head=backbone.head)
    build(kp.create_bank(root / "bank.db", backbone, space), sample_sources([Source(str(known))], 2, 2), PLAN)
    here = root / "here.json"
    done = kinprune("device", "profile", "--bank", root / "bank.db", "--samples", 40, "--out", here, "--json")
    assert done.exit_code == 0, done.stderr
    return Site(root / "bank.db", photos, here)


def adapt(kinprune: Callable[..., Any], site: Site, out: Path, *words: Any) -> Any:
    return kinprune("adapt", site.photos, "--bank", site.bank, "--out", out, *QUICK, *words)


def test_this_machine_is_profiled(kinprune: Callable[..., Any], site: Site) -> None:
    shown = json.loads(kinprune("device", "show", site.here, "--bank", site.bank, "--json").stdout)
    (profile,) = shown["profiles"]
    assert shown["name"] == "here"
    assert profile["model"] == "test_resnet"
    assert profile["samples"] == 40
    assert profile["threads"] == profile["batch"] == 1
    assert 0 < profile["fastest_ms"] <= profile["whole_ms"]
    assert list(profile["foretold_ms"]) == ["0.5", "0.2", "0.1", "0.05"]
    text = kinprune("device", "show", site.here, "--bank", site.bank).stdout
    assert "test_resnet at 32 x 32 pixels" in text


def test_a_limit_in_milliseconds_on_this_machine(kinprune: Callable[..., Any], site: Site, tmp_path: Path) -> None:
    whole = json.loads(kinprune("device", "show", site.here, "--json").stdout)["profiles"][0]["whole_ms"]
    limit = 0.9 * whole
    done = adapt(kinprune, site, tmp_path / "out", "--device-profile", site.here, "--max-latency", f"{limit}ms")
    assert done.exit_code == 0, done.stderr
    (size,) = json.loads(done.stdout)["sizes"]
    assert size["device"] == "here"
    assert size["latency_on_device"] is True
    assert size["predicted_ms"] <= limit
    assert size["budget"] == {"latency_ms": limit}
    assert size["params"] < json.loads(done.stdout)["whole"]["parameters"]
    export = tmp_path / "out" / "model.onnx"
    timed = json.loads(kinprune("device", "time", export, "--json").stdout)["milliseconds"][str(export)]
    assert 0.2 < timed / size["latency_ms"] < 5
    refused = kinprune("device", "time", tmp_path / "out" / "kinprune.json")
    assert refused.exit_code == 2 and "ONNX Runtime cannot run" in refused.stderr
    assert "ms measured" in (tmp_path / "out" / "report.html").read_text()


def test_one_score_mask_gives_a_model_a_device(kinprune: Callable[..., Any], site: Site, tmp_path: Path) -> None:
    whole = json.loads(kinprune("units", "test_resnet", "--image-size", 32, "--json").stdout)["costs"]["weight_bytes"]
    small, phone = tmp_path / "mcu.json", tmp_path / "phone.json"
    assert kinprune("device", "set", small, "--max-weights", whole // 8, "--precision", "int8").exit_code == 0
    write_device(replace(read_device(site.here), name="phone", limits={"latency_ms": 1000.0}), phone)
    devices = f"{phone},{small}"
    done = adapt(kinprune, site, tmp_path / "fleet", "--devices", devices, "--precision", "auto", "--overwrite")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert [size["device"] for size in summary["sizes"]] == ["phone", "mcu"]
    assert summary["sizes"][0]["precision"] == "fp32"  # the only one it was timed in
    assert summary["sizes"][1]["weight_bytes"] <= whole // 8
    for name, size in zip(("phone", "mcu"), summary["sizes"], strict=True):
        folder = tmp_path / "fleet" / name
        assert (folder / "model.onnx").stat().st_size == size["exported_bytes"]
        assert kp.load(folder).classes == ("apple", "pear")
        assert kp.devices.read_metadata(folder / "model.onnx").precision == size["precision"]
    assert (tmp_path / "fleet" / "report.html").is_file()


def test_int8_counts_and_ships_int8(kinprune: Callable[..., Any], site: Site, tmp_path: Path) -> None:
    (full,) = json.loads(adapt(kinprune, site, tmp_path / "a", "--keep", "0.5").stdout)["sizes"]
    done = adapt(kinprune, site, tmp_path / "b", "--keep", "0.5", "--precision", "int8")
    assert done.exit_code == 0, done.stderr
    (eight,) = json.loads(done.stdout)["sizes"]
    assert eight["params"] == full["params"]
    assert eight["weight_bytes"] < full["weight_bytes"] / 2
    assert eight["exported_bytes"] < full["exported_bytes"]
    assert eight["precision"] == "int8"
    assert 0 <= eight["accuracy_exported"] <= 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--max-latency", "5ms"), "needs a device's profile"),
        (("--device-profile", "HERE", "--max-latency", "0.0001ms"), "cannot be reached: .* still needs"),
        (("--device-profile", "HERE", "--max-latency", "soon"), "expected a time above 0 such as 5ms"),
        (("--device-profile", "HERE"), "sets no limit and no budget was given"),
        (("--device-profile", "HERE", "--devices", "HERE"), "expected one of them"),
        (("--devices", "HERE,HERE"), "two devices are called 'here'"),
        (("--devices", ","), "names no file"),
        (("--device-profile", "nowhere.json"), "cannot be read"),
        (("--keep", "0.5", "--inference-threads", "2"), "give --device-profile too"),
        (("--device-profile", "HERE", "--keep", "0.5", "--inference-threads", "2"), "profiled with threads 1"),
        (("--device-profile", "HERE", "--keep", "0.5", "--inference-batch", "3"), "profiled with batch 1"),
        (("--keep", "0.5", "--precision", "int4"), "there is no precision 'int4'"),
        (("--device-profile", "HERE", "--max-latency", "5ms", "--precision", "int8"), "no profile to foretell it"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    kinprune: Callable[..., Any], site: Site, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    import re

    done = adapt(kinprune, site, tmp_path / "out", *(word.replace("HERE", str(site.here)) for word in words))
    assert done.exit_code == 2
    assert re.search(told, " ".join(done.stderr.split()))
    assert not (tmp_path / "out").exists()


def test_a_profile_of_another_backbone_is_refused(kinprune: Callable[..., Any], site: Site, tmp_path: Path) -> None:
    device = read_device(site.here)
    other = replace(device, profiles=(replace(device.profiles[0], units="0" * 64),))
    write_device(other, tmp_path / "other.json")
    done = adapt(kinprune, site, tmp_path / "out", "--device-profile", tmp_path / "other.json", "--max-latency", "5ms")
    assert done.exit_code == 2
    assert "another backbone or image size" in done.stderr


def test_pruning_from_scratch_keeps_a_devices_limit(kinprune: Callable[..., Any], site: Site, tmp_path: Path) -> None:
    whole = json.loads(kinprune("device", "show", site.here, "--json").stdout)["profiles"][0]["whole_ms"]
    words = (
        "prune",
        site.photos,
        "--model",
        "test_resnet",
        "--random",
        "--image-size",
        32,
        "--steps",
        "0",
        "--rounds",
        2,
    )
    words += ("--round-steps", 0, "--device-profile", site.here, "--json")
    done = kinprune(*words, "--max-latency", f"{0.9 * whole}ms", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["device"] == "here" and summary["precision"] == "fp32"
    assert summary["predicted_ms"] <= 0.9 * whole
    assert summary["costs"]["parameters"] < summary["whole"]["parameters"]
    open_to = kinprune(*words, "--keep", "0.5", "--precision", "auto", "--out", tmp_path / "two")
    assert open_to.exit_code == 2 and "several precisions are open (fp32, fp16, int8)" in open_to.stderr


def test_alternatives_need_exports(kinprune: Callable[..., Any], site: Site, tmp_path: Path) -> None:
    done = adapt(kinprune, site, tmp_path / "out", "--keep", "0.5", "--precision", "auto", "--no-onnx")
    assert done.exit_code == 2 and "their exports are what tells which is best" in done.stderr
    assert not (tmp_path / "out").exists()


def test_limits_are_set_and_stay(kinprune: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "mcu.json"
    for words in (("--max-weights", "256KB", "--name", "tiny"), ("--max-memory", "1MB", "--precision", "int8")):
        assert kinprune("device", "set", path, *words).exit_code == 0
    device = read_device(path)
    assert device.name == "tiny"
    assert device.precision == "int8"
    assert device.limits == {"weight_bytes": 256_000, "peak_memory_bytes": 1_000_000}
    text = kinprune("device", "set", path, "--max-latency", "5ms").stdout
    assert "256 kB of weights" in text and "5 ms" in text
    refused = kinprune("device", "set", path, "--max-weights", "20%")
    assert refused.exit_code == 2 and "no share of a model" in refused.stderr
    assert read_device(path).limits["weight_bytes"] == 256_000


def test_a_kit_runs_where_there_is_no_pytorch(kinprune: Callable[..., Any], site: Site, tmp_path: Path) -> None:
    kit = tmp_path / "kit.pyz"
    done = kinprune("device", "kit", "--bank", site.bank, "--samples", 40, "--out", kit, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == kit.stat().st_size < 1_000_000
    # A finder in front of all others that knows neither PyTorch nor timm nor what else a device may lack.
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'timm', 'onnx', 'rich', 'typer', 'scipy', 'safetensors'):\n"
        "            raise ImportError(f'{name} is not on this device')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    out = tmp_path / "pi.json"
    run = subprocess.run(
        [sys.executable, str(kit), "--out", str(out), "--threads", "1"],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    device = read_device(out)
    assert device.name == "pi"
    assert device.profiles[0].units == read_device(site.here).profiles[0].units
    found = adapt(kinprune, site, tmp_path / "out", "--device-profile", out, "--max-latency", "100ms")
    assert found.exit_code == 0, found.stderr
    again = subprocess.run(
        [sys.executable, str(kit), "--time", str(tmp_path / "out" / "model.onnx")],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert again.stdout.endswith(" ms\n"), again.stderr


def test_a_damaged_kit_is_refused(kinprune: Callable[..., Any], tmp_path: Path) -> None:
    from kinprune.devices.kit_run import run_kit
    from kinprune.errors import DeviceError

    (tmp_path / "kit.pyz").write_bytes(b"no zip")
    with pytest.raises(DeviceError, match="no kit, or a damaged one"):
        run_kit(tmp_path / "kit.pyz", "pi", 1, 1)
    with zipfile.ZipFile(tmp_path / "empty.pyz", "w"):
        pass
    with pytest.raises(DeviceError, match="holds no models"):
        run_kit(tmp_path / "empty.pyz", "pi", 1, 1)


@pytest.mark.parametrize("command", ["profile", "kit"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    kinprune: Callable[..., Any], tmp_path: Path, command: str
) -> None:
    for out in (tmp_path / "nowhere" / "pi.json", tmp_path):
        refused = kinprune("device", command, "--bank", tmp_path / "no.db", "--out", out)
        assert refused.exit_code == 2 and "cannot be written" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_not_lost(kinprune: Callable[..., Any], site: Site) -> None:
    before = site.here.read_bytes()
    done = kinprune("device", "profile", "--bank", site.bank, "--out", site.here)
    assert done.exit_code == 2 and "is there already" in done.stderr
    assert site.here.read_bytes() == before
    for words in ((), ("--bank", site.bank, "--model", "resnet18")):
        refused = kinprune("device", "profile", "--out", site.here.with_name("new.json"), *words)
        assert refused.exit_code == 2 and "either --bank or --model" in refused.stderr
