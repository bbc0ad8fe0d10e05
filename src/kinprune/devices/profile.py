"""Profiles: a device timed with small models of a backbone, and what its latencies say of all others."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinprune.backbones import Backbone
from kinprune.devices.device import Device, Profile, this_machine
from kinprune.devices.kit import Samples
from kinprune.devices.kit_run import OnTimed, time_samples
from kinprune.devices.prediction import LatencyModel, fit_latency
from kinprune.devices.template import learn_template
from kinprune.devices.timing import Setting
from kinprune.devices.widths import MULTIPLES, round_counts, sample_counts
from kinprune.errors import DeviceError
from kinprune.precision import Precision
from kinprune.units import UnitSpace

SAMPLES = 200
CALIBRATION_IMAGES = 8
FREE = 0.02
"""The share of latency that rounding widths up may cost and still count as free."""
TRIED_MASKS = 64

OnStage = Callable[[str], None]


def make_samples(
    backbone: Backbone,
    space: UnitSpace,
    precisions: Sequence[Precision] = ("fp32",),
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    on_stage: OnStage | None = None,
) -> dict[Precision, Samples]:
    """The small models that a device is timed with, for each precision.

    Raises ExportError where the backbone cannot be exported, or its file does not follow from its widths.
    """
    counts = sample_counts(space, samples, seed)
    size = backbone.preprocessing.image_size
    made: dict[Precision, Samples] = {}
    for precision in precisions:
        if on_stage is not None:
            on_stage(f"exporting in {precision}")
        calibration = _noise_images(size, seed) if precision == "int8" else None
        template = learn_template(
            backbone.model, space, backbone.preprocessing, precision=precision, calibration=calibration, seed=seed
        )
        made[precision] = Samples(backbone.spec.name, space, size, precision, template, counts)
    return made


def _noise_images(size: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (CALIBRATION_IMAGES, 3, *size), dtype=torch.uint8, generator=generator)


def profile_here(
    device: Device,
    samples: Mapping[Precision, Samples],
    setting: Setting,
    on_timed: OnTimed | None = None,
) -> Device:
    """The device with a profile of this machine for each precision. Raises DeviceError where nothing runs here."""
    for one in samples.values():
        with tempfile.TemporaryDirectory() as folder:
            for number, counts in enumerate(one.counts):
                (Path(folder) / f"{number:04d}.onnx").write_bytes(one.template.at(counts))
            device = device.with_profile(time_samples(Path(folder), one.describe(), setting, on_timed))
    return device


def latency_of(profile: Profile, space: UnitSpace) -> LatencyModel:
    """What a profile foretells of any mask of a unit space. Raises DeviceError where it is of another one."""
    counts = np.array(profile.counts, dtype=np.int64)
    if counts.shape[1] != len(space.groups) or profile.units != space.fingerprint:
        raise DeviceError(
            f"the profile is of another backbone or image size ({profile.model} at {profile.image_size[0]} x "
            f"{profile.image_size[1]} pixels, units {profile.units[:12]}; expected units {space.fingerprint[:12]}): "
            "profile the device with this bank or model"
        )
    return fit_latency(space, counts, np.array(profile.milliseconds))


def preferred_multiple(model: LatencyModel, seed: int = 0) -> int:
    """The greatest multiple that widths can be rounded up to for nothing: what the device's vectors hold.

    Each multiple is compared with the best before it: nearly any beats odd widths.
    """
    space = model.space
    generator = np.random.default_rng(seed)
    shares = np.exp(generator.uniform(np.log(0.05), np.log(0.9), (TRIED_MASKS, len(space.sizes))))
    odd = np.maximum((space.sizes * shares).astype(np.int64), 1)
    best, fastest = 1, model.predict(odd)
    for multiple in MULTIPLES:
        found = model.predict(np.array([_rounded_up(space, row, multiple) for row in odd]))
        if float(np.median(found / fastest)) <= 1 + FREE:
            best, fastest = multiple, found
    return best


def _rounded_up(space: UnitSpace, counts: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    steps = np.array([multiple // np.gcd(multiple, group.width) for group in space.groups], dtype=np.int64)
    return round_counts(space, -(-counts // steps) * steps, multiple)


def is_here(profile: Profile) -> bool:
    """Whether a profile is of this machine and of the runtime that is installed here."""
    try:
        import onnxruntime
    except ImportError:
        return False
    here = f"onnxruntime {onnxruntime.__version__}"
    return dict(profile.machine) == this_machine() and profile.runtime == here


def check_setting(device: Device, profile: Profile, threads: int | None, batch: int | None) -> None:
    """Refuse a profile made under another number of threads or images at a time, with DeviceError."""
    for what, wanted, found in (("threads", threads, profile.threads), ("batch", batch, profile.batch)):
        if wanted is not None and wanted != found:
            raise DeviceError(
                f"{device.name} was profiled with {what} {found}, and {what} {wanted} is asked for: latencies do not "
                f"carry over, profile it again with --{what} {wanted}"
            )
