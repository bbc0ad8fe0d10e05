"""Whatever happens to an artifact's files is noticed, and is always the same error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kinprune.artifact import Artifact, load, save
from kinprune.backbones import BackboneSpec, fingerprint
from kinprune.backbones.spec import build_model
from kinprune.errors import ArtifactError
from kinprune.preprocessing import Preprocessing
from kinprune.units import Mask, UnitSpace, attributes_of, extract, find_units

FILES = ("kinprune.json", "model.safetensors")
SPEC = BackboneSpec("vit_tiny_patch16_224", {"img_size": [16, 16], "depth": 1, "embed_dim": 48}, 2, "head")
PREPROCESSING = Preprocessing((16, 16))
MODEL = build_model(SPEC.name, SPEC.arguments, SPEC.num_classes, seed=0)


@pytest.fixture(scope="module")
def space() -> UnitSpace:
    return find_units(MODEL, PREPROCESSING.image_size, stream=True, head=SPEC.head)


def artifact_of(space: UnitSpace, seed: int) -> Artifact:
    """A random mask with its own share kept in every group."""
    random, kept = np.random.default_rng(seed), np.zeros(len(space), dtype=bool)
    for part in space.split(kept):
        part[random.choice(len(part), int(random.integers(1, len(part) + 1)), replace=False)] = True
    groups = list(zip(space.groups, space.split(kept), strict=True))
    return Artifact(
        extract(MODEL, space, Mask(kept, space.fingerprint)),
        SPEC,
        PREPROCESSING,
        ("yes", "no"),
        kept={group.name: np.flatnonzero(part).tolist() for group, part in groups},
        group_sizes={group.name: group.size for group, _ in groups},
        kinds={group.name: group.kind for group, _ in groups},
        backbone_fingerprint=fingerprint(MODEL, SPEC, PREPROCESSING),
        space_fingerprint=space.fingerprint,
        attributes=attributes_of(space, space.counts(kept).tolist()),
    )


@pytest.fixture(scope="module")
def stored(space: UnitSpace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(artifact_of(space, 0), tmp_path_factory.mktemp("artifact") / "model")


def refused_with(directory: Path, name: str, raw: bytes) -> None:
    """Loading with other content of one file raises ArtifactError, and nothing else."""
    whole = (directory / name).read_bytes()
    try:
        (directory / name).write_bytes(raw)
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            load(directory)
    finally:
        (directory / name).write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_truncated_files_are_refused(stored: Path, name: str, data: st.DataObject) -> None:
    whole = (stored / name).read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    refused_with(stored, name, whole[:length])


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flipped_bytes_are_refused(stored: Path, name: str, data: st.DataObject) -> None:
    raw = bytearray((stored / name).read_bytes())
    for place in data.draw(st.sets(st.integers(0, len(raw) - 1), min_size=1, max_size=3)):
        raw[place] ^= data.draw(st.integers(1, 255))
    refused_with(stored, name, bytes(raw))


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_inserted_and_appended_bytes_are_refused(stored: Path, name: str, data: st.DataObject) -> None:
    whole = (stored / name).read_bytes()
    place = data.draw(st.integers(0, len(whole)))
    more = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b" ", b"\n", b"\t", b"\r", b"0"])))
    refused_with(stored, name, whole[:place] + more + whole[place:])


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=200))
@example(raw=b"")
@example(raw=b'{"format": 1}')
@example(raw=b'{"format": ' + b"9" * 5000 + b"}")
def test_arbitrary_bytes_are_refused(stored: Path, raw: bytes) -> None:
    for name in FILES:
        refused_with(stored, name, raw)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31))
def test_every_mask_comes_back(space: UnitSpace, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    saved = artifact_of(space, seed)
    loaded = load(save(saved, tmp_path_factory.mktemp("artifact") / "model"))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(saved.model(images), loaded.model(images))
    assert loaded.kept == saved.kept
    assert loaded.attributes == saved.attributes
