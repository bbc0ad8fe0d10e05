from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kinprune.devices.device import Profile
from kinprune.devices.prediction import LatencyModel, describe_layers, features, fit_latency
from kinprune.devices.profile import latency_of, preferred_multiple
from kinprune.devices.widths import round_counts, sample_counts
from kinprune.errors import DeviceError
from kinprune.units import UnitSpace

Latency = Callable[[NDArray[np.int64]], NDArray[np.float64]]


@pytest.fixture(scope="module")
def model(profile: Profile, space: UnitSpace) -> LatencyModel:
    return latency_of(profile, space)


def test_a_device_that_is_a_sum_of_its_layers_is_foretold_on_models_it_was_not_timed_with(
    model: LatencyModel, space: UnitSpace, true_latency: Latency
) -> None:
    others = sample_counts(space, 60, seed=5)[13:]
    errors = np.abs(model.predict(others) / true_latency(others) - 1)
    assert np.median(errors) < 0.02
    assert errors.max() < 0.1
    assert model.error < 0.02


def test_the_multiple_that_vectors_hold_is_found(model: LatencyModel) -> None:
    assert preferred_multiple(model) == 8


def test_the_bound_is_above_what_is_expected(model: LatencyModel, space: UnitSpace, true_latency: Latency) -> None:
    counts = sample_counts(space, 30, seed=2)
    assert np.all(model.bound(counts) >= model.predict(counts))
    assert np.mean(true_latency(counts) <= model.bound(counts) * 1.001) >= 0.9


def test_noise_is_told_as_error_and_margin(space: UnitSpace, true_latency: Latency) -> None:
    counts = sample_counts(space, 200)
    noise = np.exp(np.random.default_rng(1).normal(0, 0.1, len(counts)))
    found = fit_latency(space, counts, true_latency(counts) * noise)
    assert 0.03 < found.error < 0.15
    assert 0.08 < found.margin < 0.4


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_fewer_units_of_liked_widths_never_take_longer(model: LatencyModel, data: st.DataObject) -> None:
    space = model.space
    shares = data.draw(st.lists(st.floats(0.01, 1), min_size=len(space.groups), max_size=len(space.groups)))
    less = data.draw(st.lists(st.floats(0.01, 1), min_size=len(space.groups), max_size=len(space.groups)))
    many = round_counts(space, space.sizes * np.array(shares), 32)
    few = np.minimum(round_counts(space, space.sizes * np.array(shares) * np.array(less), 32), many)
    assert model.predict(few[None])[0] <= model.predict(many[None])[0] * (1 + 1e-9)


def test_features_are_never_negative_and_count_what_they_say(space: UnitSpace) -> None:
    layers = describe_layers(space)
    counts = sample_counts(space, 40)
    found = features(space, layers, counts)
    assert found.min() >= 0
    assert np.all(found[:, 0] == 1)
    # The first features after the constant are the work of each kind of layer: multiply-accumulates a unit.
    kinds = layers.alike.max() + 1
    work = (counts * layers.work).sum(1)
    assert np.allclose(found[:, 1 : 1 + kinds].sum(1), work)


def test_a_profile_of_another_backbone_is_refused(profile: Profile) -> None:
    import kinprune as kp

    other = kp.load_backbone("test_resnet", num_classes=3, random=True, image_size=32)
    streamed = kp.find_units(other.model, (32, 32), head=other.head, stream=True)
    with pytest.raises(DeviceError, match="another backbone or image size"):
        latency_of(profile, streamed)


@pytest.mark.parametrize("multiple", [1, 4, 8, 16, 32])
def test_sampled_widths_are_whole_blocks(space: UnitSpace, multiple: int) -> None:
    wanted = space.sizes * 0.37
    found = round_counts(space, wanted, multiple)
    assert np.all(found >= 1)
    assert np.all(found <= space.sizes)
    whole = found == space.sizes
    widths = np.array([group.width for group in space.groups])
    assert np.all(whole | (found * widths % multiple == 0))


def test_samples_begin_with_the_whole_model_and_repeat(space: UnitSpace) -> None:
    found = sample_counts(space, 100, seed=3)
    assert np.array_equal(found[0], space.sizes)
    assert np.array_equal(found, sample_counts(space, 100, seed=3))
    assert found.min() >= 1
    assert np.all(found <= space.sizes)
    assert len(np.unique(found[13:], axis=0)) == 87
