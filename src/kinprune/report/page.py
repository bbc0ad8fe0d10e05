"""The page: contents into the template, and onto the disk in one piece."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from kinprune import quantities
from kinprune.adaptation import Adapted
from kinprune.report.charts import COLOURS, mark_of
from kinprune.report.contents import contents_of
from kinprune.report.inputs import ReportError, Tried
from kinprune.report.kinship import PICTURED
from kinprune.tasks import DecodedTask


def write_report(
    path: str | Path,
    adapted: Adapted,
    task: DecodedTask,
    *,
    samples: Mapping[str, Tensor] | None = None,
    latencies: Sequence[float | None] | None = None,
    tried: Sequence[Tried] | None = None,
) -> None:
    """Write an adaptation's report to ``path``: one HTML file that needs nothing beside it, no script among that.

    ``task`` is what was adapted to. ``samples`` are images uint8 ``[n, 3, h, w]`` by class name of source tasks, the
    first of which is shown beside the neighbours that have the class. ``latencies`` are milliseconds of one image in
    ONNX Runtime: of the whole model, then of each size, None where there is none; ``tried`` what was found of each
    size's export. An older report is replaced only once the new one is complete. The same input gives the same file.

    Raises:
        ReportError: the inputs do not belong together, or the file cannot be written.
    """
    target = Path(path).expanduser()
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise ReportError(f"{target} cannot be written: expected the path of a file in a folder that is there")
    # Names of folders may hold what is no Unicode.
    text = render_report(adapted, task, samples=samples, latencies=latencies, tried=tried)
    content = text.encode("utf-8", "backslashreplace")
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except OSError as error:
        raise ReportError(f"{target} cannot be written ({error}): free space, or choose another folder") from error
    finally:
        beside.unlink(missing_ok=True)  # moved into place, there is none


def render_report(
    adapted: Adapted,
    task: DecodedTask,
    *,
    samples: Mapping[str, Tensor] | None = None,
    latencies: Sequence[float | None] | None = None,
    tried: Sequence[Tried] | None = None,
) -> str:
    """The report's HTML; see ``write_report``."""
    contents = contents_of(adapted, task, samples=samples, latencies=latencies, tried=tried)
    return _environment().get_template("page.html").render(report=contents)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kinprune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        colours=COLOURS, mark_of=mark_of, pictured=PICTURED, plural=quantities.plural, minus=quantities.MINUS
    )
    environment.filters.update(
        percent=quantities.percent,
        round_percent=quantities.round_percent,
        points=quantities.points,
        setting=quantities.setting,
    )
    return environment
