"""Template: what a backbone's exported file is at any widths, without exporting it again.

A few exports at different widths show which numbers in the file follow the widths: sizes of weights, shapes, groups of
convolutions. Each is an affine function of how many units the groups keep, so that the file of any other mask can be
written down at once. Its weights are noise of the right kind: how long a model takes does not depend on them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kinprune.devices.noise import ALIGNMENT, NOISE_FILE, Segment
from kinprune.devices.onnx import export_onnx
from kinprune.errors import ExportError
from kinprune.precision import Precision
from kinprune.preprocessing import Preprocessing
from kinprune.units import Mask, UnitSpace, extract
from kinprune.units.layout import affine

Counts = NDArray[np.int64]
MOST_EXPORTS = 8
TRIES = 200
SMALL = 1024
"""Bytes up to which a tensor's real values stay in the file."""


@dataclass(frozen=True)
class Affine:
    """``base + slopes @ counts``, a whole number for every counts ``[g]``."""

    base: int
    slopes: tuple[tuple[int, int], ...]  # (group, slope)

    def of(self, counts: Counts) -> int:
        """The value at ``counts [g]``."""
        return self.base + sum(slope * int(counts[group]) for group, slope in self.slopes)


Number = int | Affine


@dataclass(frozen=True, eq=False)
class Template:
    """A file whose numbers follow the widths.

    ``model`` is the whole model's ONNX without weights. ``sizes`` are the dimensions of initialisers by name,
    ``values`` the whole numbers in them where these follow the widths, ``attributes`` those of nodes by (number of the
    node, name). ``segments`` say where in the noise each large tensor's values begin, and of what kind they are.
    """

    model: Any
    sizes: Mapping[str, tuple[Number, ...]]
    values: Mapping[str, tuple[Number, ...]]
    attributes: Mapping[tuple[int, str], tuple[Number, ...]]
    segments: Mapping[str, Segment]

    def at(self, counts: Counts) -> bytes:
        """The file for ``counts [g]``, whose large tensors are found in ``NOISE_FILE`` beside it."""
        made = copy.deepcopy(self.model)
        for tensor in made.graph.initializer:
            self._fill(tensor, counts)
        for number, name in self.attributes:
            attribute = next(one for one in made.graph.node[number].attribute if one.name == name)
            now = [_value(one, counts) for one in self.attributes[number, name]]
            if attribute.ints:
                attribute.ints[:] = now
            else:
                attribute.i = now[0]
        return bytes(made.SerializeToString())

    def _fill(self, tensor: Any, counts: Counts) -> None:
        from onnx import TensorProto, numpy_helper

        name = tensor.name
        dims = [_value(one, counts) for one in self.sizes[name]]
        if name in self.values:
            now = np.array([_value(one, counts) for one in self.values[name]], dtype=np.int64).reshape(dims)
            tensor.CopyFrom(numpy_helper.from_array(now, name))
        elif name in self.segments:
            segment = self.segments[name]
            del tensor.dims[:]
            tensor.dims.extend(dims)
            tensor.data_location = TensorProto.EXTERNAL
            length = int(np.prod(dims, dtype=np.int64)) * segment.itemsize
            for key, value in (("location", NOISE_FILE), ("offset", segment.offset), ("length", length)):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)
        elif list(tensor.dims) != dims:
            whole = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.resize(whole, dims), name))


def learn_template(
    model: nn.Module,
    space: UnitSpace,
    preprocessing: Preprocessing,
    *,
    precision: Precision = "fp32",
    calibration: Tensor | None = None,
    seed: int = 0,
) -> Template:
    """Learn the template of a backbone from a few exports at widths that tell all groups apart.

    ``model`` has any classifier. int8 needs ``calibration`` images, ``uint8 [n, 3, h, w]``.

    Raises:
        ExportError: the model cannot be exported, or what its file looks like does not follow from its widths.
    """
    forms = _forms(space)
    counts = _telling(space, forms, seed)
    files = list(_exports(model, space, preprocessing, counts, precision, calibration))
    whole = files[0]
    for other in files[1:]:
        _same_structure(whole, other)
    shapes = [{one.name: list(one.dims) for one in file.graph.initializer} for file in files]
    match = _Matcher(forms, counts)
    sizes = {name: match.all([shape[name] for shape in shapes], f"the size of {name}") for name in shapes[0]}
    values = _values(files, match)
    attributes = _attributes(files, match)
    segments = _segments(whole, values)
    return Template(_hollow(whole, segments), sizes, values, attributes, segments)


def _value(number: Number, counts: Counts) -> int:
    return number.of(counts) if isinstance(number, Affine) else number


def _forms(space: UnitSpace) -> list[tuple[tuple[int, int], ...]]:
    """What a size may depend on: each group alone, and every sum of groups that a tensor's size is."""
    found: dict[tuple[tuple[int, int], ...], None] = {((group, 1),): None for group in range(len(space.groups))}
    for layouts in space.tensors.values():
        for layout in layouts:
            _, slopes = affine(layout)
            if len(slopes) > 1:
                found[tuple(sorted(slopes.items()))] = None
    return list(found)


def _telling(space: UnitSpace, forms: Sequence[tuple[tuple[int, int], ...]], seed: int) -> Counts:
    """Counts ``[e, g]``, the whole model's first, at which no two forms could be taken for each other."""
    generator = np.random.default_rng(seed)
    for exports in range(4, MOST_EXPORTS + 1):
        for _ in range(TRIES):
            low = np.maximum(space.sizes // 4, 1)
            drawn = generator.integers(low, space.sizes + 1, size=(exports - 1, len(space.sizes)))
            counts = np.concatenate([space.sizes[None], drawn]).astype(np.int64)
            if _tell_apart(forms, counts):
                return counts
    raise ExportError(
        f"{len(forms)} sizes could not be told apart by {MOST_EXPORTS} exports: the model has too many alike"
    )


def _tell_apart(forms: Sequence[tuple[tuple[int, int], ...]], counts: Counts) -> bool:
    directions = set()
    for form in forms:
        values = sum(slope * counts[:, group] for group, slope in form)
        steps = np.asarray(values)[1:] - np.asarray(values)[0]
        if not steps.any():
            return False
        divisor = np.gcd.reduce(steps) * (1 if steps[np.flatnonzero(steps)[0]] > 0 else -1)
        directions.add(tuple((steps // divisor).tolist()))
    return len(directions) == len(forms)


def _exports(
    model: nn.Module,
    space: UnitSpace,
    preprocessing: Preprocessing,
    counts: Counts,
    precision: Precision,
    calibration: Tensor | None,
) -> Iterator[Any]:
    import onnx

    for row in counts:
        kept = np.concatenate([np.arange(size) < count for size, count in zip(space.sizes, row, strict=True)])
        small = extract(model, space, Mask(kept, space.fingerprint))
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside) / "model.onnx"
            export_onnx(
                small,
                path,
                classes=_names(small, space),
                preprocessing=preprocessing,
                check=False,
                precision=precision,
                calibration=calibration,
            )
            yield _canonical(onnx.load(str(path)))


def _canonical(file: Any) -> Any:
    """The file with names by place: exporters number what they make, and share constants that happen to be equal."""
    held = {tensor.name: tensor for tensor in file.graph.initializer}
    results = {output.name for output in file.graph.output}
    renamed = {
        name: f"v{number}_{place}"
        for number, node in enumerate(file.graph.node)
        for place, name in enumerate(node.output)
        if name and name not in results
    }
    tensors: list[Any] = []
    for number, node in enumerate(file.graph.node):
        node.name = f"n{number}"
        node.output[:] = [renamed.get(name, name) for name in node.output]
        for place, name in enumerate(node.input):
            if name in held:  # shared by equal values only by chance: each use has its own
                own = copy.deepcopy(held[name])
                own.name = node.input[place] = f"w{number}_{place}"
                tensors.append(own)
            else:
                node.input[place] = renamed.get(name, name)
    del file.graph.initializer[:]
    file.graph.initializer.extend(tensors)
    return file


def _names(model: nn.Module, space: UnitSpace) -> list[str]:
    assert space.head is not None
    return [str(number) for number in range(len(model.get_parameter(f"{space.head}.weight")))]


def _same_structure(whole: Any, other: Any) -> None:
    def outline(file: Any) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
        return [(node.op_type, tuple(node.input), tuple(node.output)) for node in file.graph.node]

    if outline(whole) != outline(other):
        raise ExportError(
            "the exported file has other operations at other widths, so that widths cannot be profiled: "
            "try another opset, or a newer PyTorch"
        )


@dataclass(frozen=True, eq=False)
class _Matcher:
    """Finds the affine function of counts ``[e, g]`` that gives what was seen in ``e`` files."""

    forms: Sequence[tuple[tuple[int, int], ...]]
    counts: Counts

    def all(self, seen: Sequence[Sequence[int]], what: str) -> tuple[Number, ...]:
        """One function for each of the numbers that every file has."""
        return tuple(self.one(np.array(column), what) for column in zip(*seen, strict=True))

    def one(self, seen: Counts, what: str) -> Number:
        if (seen == seen[0]).all():
            return int(seen[0])
        for form in self.forms:
            values = np.asarray(sum(slope * self.counts[:, group] for group, slope in form))
            place = int(np.argmax(values != values[0]))
            rise, run = int(seen[place] - seen[0]), int(values[place] - values[0])
            if rise % run:
                continue
            slope = rise // run
            base = int(seen[0] - slope * values[0])
            if (seen == base + slope * values).all():
                return Affine(base, tuple((group, slope * part) for group, part in form))
        raise ExportError(f"{what} in the exported file does not follow from the widths: it cannot be profiled")


def _values(files: Sequence[Any], match: _Matcher) -> dict[str, tuple[Number, ...]]:
    """The whole numbers in initialisers (shapes, starts, ends) that differ between files."""
    from onnx import TensorProto, numpy_helper

    def read(file: Any) -> dict[str, list[int]]:
        shapes = [one for one in file.graph.initializer if one.data_type == TensorProto.INT64]
        return {one.name: numpy_helper.to_array(one).reshape(-1).tolist() for one in shapes}

    seen = [read(file) for file in files]
    differing = [name for name in seen[0] if any(one[name] != seen[0][name] for one in seen)]
    return {name: match.all([one[name] for one in seen], f"the numbers of {name}") for name in differing}


def _attributes(files: Sequence[Any], match: _Matcher) -> dict[tuple[int, str], tuple[Number, ...]]:
    def read(file: Any) -> dict[tuple[int, str], list[int]]:
        return {
            (number, one.name): list(one.ints) or [one.i]
            for number, node in enumerate(file.graph.node)
            for one in node.attribute
        }

    seen = [read(file) for file in files]
    differing = [key for key in seen[0] if any(one[key] != seen[0][key] for one in seen)]
    return {key: match.all([one[key] for one in seen], f"{key[1]} of node {key[0]}") for key in differing}


def _segments(whole: Any, values: Mapping[str, Any]) -> dict[str, Segment]:
    from onnx import numpy_helper

    found: dict[str, Segment] = {}
    offset = 0
    for tensor in whole.graph.initializer:
        content = numpy_helper.to_array(tensor)
        if content.nbytes <= SMALL or tensor.name in values:
            continue
        middle, spread = float(content.mean(dtype=np.float64)), 1.73 * float(content.std(dtype=np.float64))
        low, high = max(middle - spread, float(content.min())), min(middle + spread, float(content.max()))
        found[tensor.name] = Segment(offset, content.size, content.dtype.name, low, high)
        offset += -(-content.nbytes // ALIGNMENT) * ALIGNMENT
    return found


def _hollow(whole: Any, segments: Mapping[str, Segment]) -> Any:
    """The file without the weights that the noise stands for, and without sizes that hold for the whole model only."""
    made = copy.deepcopy(whole)
    del made.graph.value_info[:]
    for tensor in made.graph.initializer:
        if tensor.name in segments:
            tensor.ClearField("raw_data")
    assert all(one.offset < other.offset for one, other in pairwise(segments.values()))
    return made
