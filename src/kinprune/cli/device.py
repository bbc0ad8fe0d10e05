"""``kinprune device``: how fast a device is, what it can hold, and a kit to find out where no PyTorch runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli import options as shared
from kinprune.cli.device_options import check_precision
from kinprune.cli.device_show import describe_device, print_device
from kinprune.cli.help import Sectioned
from kinprune.cli.options import BUDGET, DEVICE, MODEL, RUNNING
from kinprune.cli.output import say, stage_bar
from kinprune.cli.running import begin, guarded
from kinprune.cli.values import limit, time, whole
from kinprune.errors import DeviceError

if TYPE_CHECKING:
    from kinprune.backbones import Backbone
    from kinprune.devices.device import Device
    from kinprune.devices.kit import Samples
    from kinprune.precision import Precision
    from kinprune.units import UnitSpace

device_app = typer.Typer(
    name="device",
    help="Measure a device, set its limits, and see what they mean.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A device's file, such as pi.json.")]
Bank = Annotated[
    str | None,
    typer.Option("--bank", metavar="URL", rich_help_panel=MODEL, help="The bank whose backbone is timed."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", rich_help_panel=MODEL, help="Without a bank: a timm model name, or MODULE:FACTORY."
    ),
]
Precisions = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="NAME,...",
        rich_help_panel=DEVICE,
        help="The precisions to time the device in: fp32, fp16, int8, with commas between them.",
    ),
]
SampleCount = Annotated[
    int,
    typer.Option(
        "--samples",
        metavar="N",
        parser=whole(40),
        rich_help_panel=DEVICE,
        help="Small models to time: more take longer and foretell better.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", rich_help_panel=DEVICE, help="The device's name. [default: the file's]"),
]
RunThreads = Annotated[
    int, typer.Option("--threads", metavar="N", parser=whole(1), rich_help_panel=DEVICE, help="CPU threads of a run.")
]
RunBatch = Annotated[
    int, typer.Option("--batch", metavar="N", parser=whole(1), rich_help_panel=DEVICE, help="Images of a run.")
]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", rich_help_panel=RUNNING, help="The file to write.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=RUNNING, help="Replace a file that is there already.")
]
Default = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        rich_help_panel=DEVICE,
        help="How its models store numbers: fp32, fp16, int8, or auto for the one that answers best.",
    ),
]


def _limit(option: str, help: str, parser: Any, metavar: str) -> Any:
    return typer.Option(option, metavar=metavar, parser=parser, rich_help_panel=BUDGET, help=help)


MaxLatency = Annotated[float | None, _limit("--max-latency", "Longest time of one run: 5ms.", time, "TIME")]
MaxParams = Annotated[Any, _limit("--max-params", "Most parameters: 1.5M.", limit("count"), "COUNT")]
MaxMacs = Annotated[Any, _limit("--max-macs", "Most multiply-accumulates: 200M.", limit("count"), "COUNT")]
MaxWeights = Annotated[Any, _limit("--max-weights", "Most bytes of weights: 4MB.", limit("bytes"), "BYTES")]
MaxMemory = Annotated[Any, _limit("--max-memory", "Most memory while it runs: 8MB.", limit("bytes"), "BYTES")]


@guarded
def profile_command(
    out: Out,
    bank: Bank = None,
    model: Model = None,
    weights: shared.Weights = None,
    image_size: shared.ImageSize = None,
    stream: shared.Stream = False,
    precision: Precisions = "fp32",
    samples: SampleCount = 200,
    name: Name = None,
    threads: RunThreads = 1,
    batch: RunBatch = 1,
    overwrite: Overwrite = False,
    json: shared.Json = False,
    seed: shared.Seed = 0,
) -> dict[str, Any] | None:
    """Time this machine with a few hundred small models of a backbone, in ONNX Runtime, and write its file.

    It takes a few minutes, best with nothing else running. The file foretells the latency of any other model of that
    backbone, for adapt --device-profile. One that is there already is filled up with --overwrite: its limits stay.
    """
    before = _before(out, overwrite)
    begin("cpu", None)
    from kinprune.devices.device import write_device
    from kinprune.devices.profile import profile_here
    from kinprune.devices.timing import Setting

    wanted = _precisions(precision)
    backbone, space = _backbone(bank, model, weights, image_size, stream=stream, seed=seed)
    device = _named(before, name, out)
    with _samples(backbone, space, wanted, samples, seed) as (made, on_step):
        device = profile_here(
            device, made, Setting(threads, batch), lambda done, of: on_step("timing small models", done, of)
        )
    write_device(device, out)
    return _finish(device, space, out, json)


@guarded
def kit_command(
    out: Out,
    bank: Bank = None,
    model: Model = None,
    weights: shared.Weights = None,
    image_size: shared.ImageSize = None,
    stream: shared.Stream = False,
    precision: Precisions = "fp32",
    samples: SampleCount = 200,
    overwrite: Overwrite = False,
    json: shared.Json = False,
    seed: shared.Seed = 0,
) -> dict[str, Any] | None:
    """Write a kit that times another machine: one small file that runs there with onnxruntime alone.

    Copy it there, then: pip install onnxruntime; python kit.pyz --out pi.json; and bring pi.json back.
    """
    _check_place(out)
    if out.exists() and not overwrite:
        raise DeviceError(f"{out} is there already: choose another name, or --overwrite it")
    begin("cpu", None)
    from kinprune.devices.kit import write_kit

    wanted = _precisions(precision)
    backbone, space = _backbone(bank, model, weights, image_size, stream=stream, seed=seed)
    with _samples(backbone, space, wanted, samples, seed) as (made, _):
        write_kit(made, out)
    size = out.stat().st_size
    if json:
        return {"out": str(out), "bytes": size, "precisions": list(wanted), "samples": samples}
    say(f"{out}: {size / 1e6:.1f} MB; on the device: python {out.name} --out {out.stem}.json")
    return None


@guarded
def set_command(
    file: File,
    name: Name = None,
    max_latency: MaxLatency = None,
    max_params: MaxParams = None,
    max_macs: MaxMacs = None,
    max_weights: MaxWeights = None,
    max_memory: MaxMemory = None,
    precision: Default = None,
    json: shared.Json = False,
) -> dict[str, Any] | None:
    """Set a device's limits and precision; a file that is not there is made, for a device that cannot be timed.

    Limits that were set before and are not named stay.
    """
    from kinprune.devices.device import Device, read_device, write_device

    device = read_device(file) if file.exists() else Device(name or file.stem)
    given = {"parameters": max_params, "macs": max_macs, "weight_bytes": max_weights, "peak_memory_bytes": max_memory}
    limits: dict[str, float] = {}
    for what, amount in given.items():
        if amount is not None:
            if amount.percent:
                raise DeviceError(f"a device's limit is no share of a model, got {amount.amount}% for {what}")
            limits[what] = amount.of(0)
    if max_latency is not None:
        limits["latency_ms"] = max_latency
    wanted = check_precision(precision)
    device = replace(
        device,
        name=name or device.name,
        limits={**device.limits, **limits},
        precision=device.precision if wanted is None else wanted,
    )
    write_device(device, file)
    if json:
        return describe_device(device)
    print_device(device)
    return None


@guarded
def show_command(file: File, bank: Bank = None, json: shared.Json = False) -> dict[str, Any] | None:
    """Show a device: its limits, how it was timed, and with --bank how well its latencies are foretold."""
    from kinprune.devices.device import read_device

    device = read_device(file)
    space = None
    if bank is not None:
        _, space = _backbone(bank, None, None, None, stream=False, seed=0)
    if json:
        return describe_device(device, space)
    print_device(device, space)
    return None


@guarded
def time_command(
    files: Annotated[list[Path], typer.Argument(metavar="ONNX", help="Exported models, such as small/model.onnx.")],
    threads: RunThreads = 1,
    batch: RunBatch = 1,
    json: shared.Json = False,
) -> dict[str, Any] | None:
    """Time exported models on this machine, side by side: what a limit in milliseconds is compared with."""
    from kinprune.devices import time_models

    found = time_models(files, threads, batch)
    if json:
        return {"threads": threads, "batch": batch, "milliseconds": dict(zip(map(str, files), found, strict=True))}
    for path, value in zip(files, found, strict=True):
        typer.echo(f"{path}: {value:.3g} ms")
    return None


device_app.command("profile", cls=Sectioned)(profile_command)
device_app.command("kit", cls=Sectioned)(kit_command)
device_app.command("set", cls=Sectioned)(set_command)
device_app.command("show", cls=Sectioned)(show_command)
device_app.command("time", cls=Sectioned)(time_command)


def _check_place(out: Path) -> None:
    """Refuse, before minutes of work, what could not be written after them."""
    folder = out.absolute().parent
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DeviceError(f"{out} cannot be written: expected the path of a file in a folder that may be written to")


def _before(out: Path, overwrite: bool) -> Device | None:
    _check_place(out)
    if not out.exists():
        return None
    if not overwrite:
        raise DeviceError(f"{out} is there already: choose another name, or --overwrite its profiles")
    from kinprune.devices.device import read_device

    return read_device(out)


def _named(before: Device | None, name: str | None, out: Path) -> Device:
    from kinprune.devices.device import Device, check_device

    device = Device(name or out.stem) if before is None else replace(before, name=name or before.name)
    check_device(device)
    return device


def _precisions(text: str) -> tuple[Precision, ...]:
    from kinprune.precision import PRECISIONS

    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in PRECISIONS]
    if unknown or not names:
        raise DeviceError(f"there is no precision {text!r}, expected some of {', '.join(PRECISIONS)}")
    return tuple(one for one in PRECISIONS if one in names)


def _backbone(
    bank: str | None, model: str | None, weights: Path | None, image_size: int | None, *, stream: bool, seed: int
) -> tuple[Backbone, UnitSpace]:
    """The backbone of a bank, or a model without one; its classifier does not matter."""
    if (bank is None) == (model is None):
        raise DeviceError("expected either --bank or --model: whose small models are timed?")
    if bank is not None:
        from kinprune.bank import open_bank
        from kinprune.bank.backbone import bank_space, load_bank_backbone

        opened = open_bank(bank)
        backbone = load_bank_backbone(opened, 10, seed=seed)
        return backbone, bank_space(opened, backbone)
    from kinprune.backbones import load_backbone
    from kinprune.units import find_units

    assert model is not None
    # Latency does not depend on weights: without a file none are fetched.
    backbone = load_backbone(
        model, num_classes=10, weights=weights, random=weights is None, seed=seed, image_size=image_size
    )
    size = backbone.preprocessing.image_size
    return backbone, find_units(backbone.model, size, stream=stream, head=backbone.head)


@contextmanager
def _samples(
    backbone: Backbone, space: UnitSpace, precisions: tuple[Precision, ...], samples: int, seed: int
) -> Iterator[tuple[dict[Precision, Samples], Any]]:
    """The small models of a backbone, and the bar that was begun with them."""
    from kinprune.devices.onnx import missing_package
    from kinprune.devices.profile import make_samples

    if missing := missing_package():
        raise DeviceError(f'a profile needs the package {missing!r}: pip install "kinprune[onnx]"')
    with stage_bar() as on_step:
        yield (
            make_samples(
                backbone, space, precisions, samples=samples, seed=seed, on_stage=lambda stage: on_step(stage, 0, 0)
            ),
            on_step,
        )


def _finish(device: Device, space: UnitSpace, out: Path, json: bool) -> dict[str, Any] | None:
    if json:
        return {"out": str(out), **describe_device(device, space)}
    print_device(device, space)
    say(f"Written to {out}")
    return None
