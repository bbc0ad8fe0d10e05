"""A kit: what a device needs to be timed, as one small file that runs there with ONNX Runtime alone.

It is a Python zip application with the files of small models, without weights, and the few modules of Kinprune that
time them: ``python pi.pyz --out pi.json``. Noise for the weights is made on the device.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.artifact.files import directory_beside
from kinprune.devices.template import Template
from kinprune.precision import Precision
from kinprune.units import UnitSpace

MODULES = (
    "errors.py",
    "precision.py",
    "devices/device.py",
    "devices/noise.py",
    "devices/timing.py",
    "devices/kit_run.py",
)
"""What of Kinprune goes into a kit: modules that need Python, NumPy and ONNX Runtime alone."""
MAIN = "from kinprune.devices.kit_run import main\n\nraise SystemExit(main())\n"


@dataclass(frozen=True, eq=False)
class Samples:
    """The small models of a backbone in one precision: ``counts [n, g]``, each model's file and their noise."""

    model: str
    space: UnitSpace
    image_size: tuple[int, int]
    precision: Precision
    template: Template
    counts: NDArray[np.int64]

    def describe(self) -> dict[str, Any]:
        """What the kit says of them: all that a profile needs but the latencies."""
        return {
            "model": self.model,
            "units": self.space.fingerprint,
            "image_size": list(self.image_size),
            "precision": self.precision,
            "counts": self.counts.tolist(),
            "segments": [asdict(segment) for segment in self.template.segments.values()],
        }


def write_kit(samples: Mapping[Precision, Samples], path: Path) -> None:
    """Write the kit of a backbone's small models, in one precision or several; in place once it is complete."""
    package = Path(__file__).parents[1]
    with directory_beside(path, "tmp") as aside:
        _write(samples, package, aside / path.name)
        (aside / path.name).replace(path)


def _write(samples: Mapping[Precision, Samples], package: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("__main__.py", MAIN)
        for name in ("__init__.py", "devices/__init__.py"):
            file.writestr(f"kinprune/{name}", "")
        for name in MODULES:
            file.writestr(f"kinprune/{name}", (package / name).read_text())
        for precision, one in samples.items():
            file.writestr(f"{precision}/samples.json", json.dumps(one.describe()))
            for number, counts in enumerate(one.counts):
                file.writestr(f"{precision}/{number:04d}.onnx", one.template.at(counts))
