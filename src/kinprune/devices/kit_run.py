"""Running a kit on a device: unpack, make the noise, time every model, write the device's file.

Needs Python, NumPy and ONNX Runtime alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kinprune.devices import timing
from kinprune.devices.device import Device, Profile, this_machine, write_device
from kinprune.devices.noise import NOISE_FILE, Segment, write_noise
from kinprune.devices.timing import Setting
from kinprune.errors import DeviceError

OnTimed = Callable[[int, int], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the kit that this runs from; 2 where what was asked for cannot be done, 130 after Ctrl-C."""
    options = _options(arguments)
    try:
        if options.time:
            for path, value in zip(
                options.time, time_models(options.time, options.threads, options.batch), strict=True
            ):
                print(f"{path}: {value:.3g} ms")
            return 0
        device = run_kit(Path(sys.argv[0]), options.name or options.out.stem, options.threads, options.batch, _tell)
        write_device(device, options.out)
    except DeviceError as error:
        print(f"\nkinprune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nkinprune: interrupted; nothing was written", file=sys.stderr)
        return 130
    for profile in device.profiles:
        whole = f"{profile.milliseconds[0]:.3g} ms for the whole model"
        print(f"\n{profile.precision}: {len(profile.counts)} models timed, {whole}", file=sys.stderr)
    print(f"Written to {options.out}: take it to where kinprune adapt runs.", file=sys.stderr)
    return 0


def time_models(paths: Sequence[Path], threads: int = 1, batch: int = 1) -> list[float]:
    """Milliseconds of one run of exported models on this machine, all in turn, as profiles are made.

    Raises DeviceError where ONNX Runtime is missing, or a file is none that it reads.
    """
    _need_onnxruntime()
    setting = Setting(threads, batch)
    try:
        return timing.time_models(paths, [setting] * len(paths))
    except Exception as error:  # ONNX Runtime's errors have no base of their own; the cause stays attached
        named = ", ".join(str(path) for path in paths)
        raise DeviceError(f"ONNX Runtime cannot run {named} ({error}): give exported .onnx files") from error


def _need_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DeviceError(f"ONNX Runtime is not installed here ({error}): pip install onnxruntime") from error
    return onnxruntime


def run_kit(kit: Path, name: str, threads: int, batch: int, on_timed: OnTimed | None = None) -> Device:
    """The device that a kit finds itself on. Raises DeviceError where the kit is damaged or nothing runs here."""
    device = Device(name)
    with tempfile.TemporaryDirectory(prefix="kinprune-kit-") as folder:
        try:
            with zipfile.ZipFile(kit) as file:
                found = sorted(one for one in file.namelist() if one.endswith("/samples.json"))
                file.extractall(folder, [one for one in file.namelist() if one.endswith((".onnx", "/samples.json"))])
        except (OSError, zipfile.BadZipFile) as error:
            raise DeviceError(f"{kit} is no kit, or a damaged one ({error}): copy it here again") from error
        if not found:
            raise DeviceError(f"{kit} holds no models: make it with kinprune device kit")
        for one in found:
            described = json.loads((Path(folder) / one).read_text())
            device = device.with_profile(
                time_samples((Path(folder) / one).parent, described, Setting(threads, batch), on_timed)
            )
    return device


def time_samples(
    folder: Path, described: Mapping[str, Any], setting: Setting, on_timed: OnTimed | None = None
) -> Profile:
    """The profile of the models in ``folder``, as ``Samples.describe`` tells of them, on this machine.

    Raises DeviceError where ONNX Runtime is missing or does not run them.
    """
    onnxruntime = _need_onnxruntime()
    write_noise(folder / NOISE_FILE, [Segment(**one) for one in described["segments"]])
    paths = [folder / f"{number:04d}.onnx" for number in range(len(described["counts"]))]
    size = described["image_size"]
    try:
        milliseconds = timing.time_many(paths, setting, on_timed)
    except Exception as error:  # ONNX Runtime's errors have no base of their own; the cause stays attached
        raise DeviceError(f"ONNX Runtime {onnxruntime.__version__} cannot run the models here: {error}") from error
    return Profile(
        described["model"],
        described["units"],
        (size[0], size[1]),
        described["precision"],
        f"onnxruntime {onnxruntime.__version__}",
        this_machine(),
        setting.threads,
        setting.batch,
        tuple(tuple(row) for row in described["counts"]),
        tuple(round(value, 6) for value in milliseconds),
    )


def _tell(done: int, of: int) -> None:
    print(f"\rtiming models: {done} of {of}", end="", file=sys.stderr, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how fast this machine runs a backbone's small models.")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path, help="the device's file to write, such as pi.json")
    wanted.add_argument("--time", type=Path, nargs="+", metavar="ONNX", help="instead: time these exported models")
    parser.add_argument("--name", help="the device's name; the file's where none is given")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads that models run with (1)")
    parser.add_argument("--batch", type=_positive, default=1, help="images at a time (1)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)
