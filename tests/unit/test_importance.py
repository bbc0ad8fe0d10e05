"""Every criterion against a slow and obvious reference: explicit gates, explicit loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from timm.models import levit
from torch import Tensor, nn
from torch.nn import functional as F

from kinprune.errors import ImportanceError
from kinprune.importance import CRITERIA, Batch, Criterion, normalise, rank, score
from kinprune.units import UnitSpace, find_units

BY_BATCHES: list[Criterion] = ["activation", "taylor", "snip", "synflow"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Squeeze(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Block(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project, add."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.gate = Squeeze(inner, 3)
        self.project = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn2(self.depthwise(F.silu(self.bn1(self.expand(x))))))
        return x + self.project(self.gate(y))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.first, self.second = Block(6, 8), Block(6, 10)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.norm(self.stem(x)).relu()))
        return self.head(x.mean((2, 3)))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    model = Network().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def transformer() -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=2, embed_dim=12, num_heads=3, num_classes=4
    )
    return model.double().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": convolutional, "vit": transformer}
CASES = [(name, stream) for name in MODELS for stream in (False, True)]


def prepared(name: str, stream: bool) -> tuple[nn.Module, UnitSpace, list[Batch]]:
    with torch.random.fork_rng():
        model = MODELS[name]()
        batches = [Batch(torch.randn(3, 3, 8, 8).double(), torch.randint(0, 4, (3,))) for _ in range(2)]
    return model, find_units(model, (8, 8), stream=stream), batches


def channel_of_input(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.Conv2d) else -1


def along(values: Tensor, tensor: Tensor, dimension: int) -> Tensor:
    """A vector shaped to be broadcast along a dimension, each value repeated over the indices of its unit."""
    values = values.repeat_interleave(tensor.shape[dimension] // len(values))
    return values.reshape([-1 if place == dimension % tensor.dim() else 1 for place in range(tensor.dim())])


def gate_gradients(model: nn.Module, space: UnitSpace, batch: Batch) -> NDArray[np.float64]:
    """dL/dgate with one explicit gate a unit at the entrance of every layer that takes it in."""
    gates = [torch.ones(group.size, dtype=torch.float64, requires_grad=True) for group in space.groups]
    handles = []
    for group, gate in zip(space.groups, gates, strict=True):
        for name, _ in group.tensors("consumes"):

            def hook(module: nn.Module, inputs: tuple[Tensor, ...], gate: Tensor = gate) -> Tensor:
                return inputs[0] * along(gate, inputs[0], channel_of_input(module))

            handles.append(model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(hook))
    loss = F.cross_entropy(model(batch.images), batch.labels)
    found = torch.autograd.grad(loss, gates)
    for handle in handles:
        handle.remove()
    return torch.cat(found).numpy()


@pytest.mark.parametrize(("name", "stream"), CASES)
def test_taylor_and_snip_are_the_gradients_of_explicit_gates(name: str, stream: bool) -> None:
    model, space, batches = prepared(name, stream)
    gradients = np.stack([gate_gradients(model, space, batch) for batch in batches])
    assert (np.abs(gradients) > 1e-9).mean() > 0.9
    np.testing.assert_allclose(score("taylor", model, space, batches), (gradients**2).mean(0), rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose(score("snip", model, space, batches), np.abs(gradients).mean(0), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("name", "stream"), CASES)
def test_activation_is_the_mean_absolute_input_of_the_consumers(name: str, stream: bool) -> None:
    model, space, batches = prepared(name, stream)
    expected = []
    for group in space.groups:
        seen: list[Tensor] = []
        modules = [model.get_submodule(name.rpartition(".")[0]) for name, _ in group.tensors("consumes")]

        def hook(module: nn.Module, inputs: Any, seen: list[Tensor] = seen, size: int = group.size) -> None:
            channels = inputs[0].movedim(channel_of_input(module), 0)
            seen.append(channels.abs().reshape(size, len(channels) // size, -1).mean((1, 2)))

        handles = [module.register_forward_pre_hook(hook) for module in modules]
        with torch.no_grad():
            for batch in batches:
                model(batch.images)
        for handle in handles:
            handle.remove()
        assert len(seen) == len(batches) * len(modules)
        expected.append(torch.stack(seen).mean(0).numpy())
    np.testing.assert_allclose(score("activation", model, space, batches), np.concatenate(expected), rtol=1e-9)


@pytest.mark.parametrize(("name", "stream"), CASES)
@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_magnitudes_are_norms_of_the_weights_that_make_a_unit(
    name: str, stream: bool, criterion: Criterion, power: int
) -> None:
    model, space, _ = prepared(name, stream)
    expected = []
    for group in space.groups:
        for unit in range(group.size):
            values = [
                rows_of(model.get_parameter(name).detach(), group.size, group.width, unit)
                for name, _ in group.tensors("produces")
            ]
            whole = torch.cat([value.flatten() for value in values])
            expected.append(float(whole.norm(power)))
    np.testing.assert_allclose(score(criterion, model, space), expected, rtol=1e-9)


def rows_of(weight: Tensor, size: int, width: int, unit: int) -> Tensor:
    """The rows that make a unit; a head has rows in queries, keys and values."""
    places = [row for row in range(len(weight)) if row // width % size == unit]
    assert len(places) == len(weight) // size
    return weight[places]


@pytest.mark.parametrize(("name", "stream"), CASES)
def test_synflow_is_what_flows_into_the_consumers_of_the_absolute_network(name: str, stream: bool) -> None:
    model, space, batches = prepared(name, stream)
    positive = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
    positive(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum().backward()
    expected = []
    for group in space.groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for name_, dimension in group.tensors("consumes"):
            parameter = positive.get_parameter(name_)
            flow = (parameter.detach() * parameter.grad).abs().movedim(dimension, 0)
            total += flow.reshape(group.size, -1).sum(1)
        expected.append(total.numpy())
    np.testing.assert_allclose(score("synflow", model, space, batches), np.concatenate(expected), rtol=1e-9)


def two_layers() -> tuple[nn.Module, UnitSpace, list[Batch]]:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0, 0], [0, -2, 0]]))
        model[2].weight.copy_(torch.eye(2))
    image = torch.tensor([1.0, -1, 0], dtype=torch.float64).reshape(1, 3, 1, 1)
    return model, find_units(model, (1, 1)), [Batch(image, torch.tensor([0]))]


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # Hidden nodes (1, 2) are the logits, p = (0.2689, 0.7311), dL/dlogits = (-0.7311, 0.7311).
        ("taylor", [0.5344466, 2.1377864]),
        ("snip", [0.7310586, 1.4621172]),
        ("activation", [1, 2]),
        ("l1", [1, 2]),
        ("l2", [1, 2]),
        ("synflow", [1, 2]),
    ],
)
def test_two_nodes_by_hand(criterion: Criterion, expected: list[float]) -> None:
    model, space, batches = two_layers()
    assert len(space) == 2
    assert score(criterion, model, space, batches) == pytest.approx(expected, abs=1e-6)


def test_batches_are_averaged_not_summed() -> None:
    model, space, batches = two_layers()
    for criterion in BY_BATCHES:
        once, thrice = score(criterion, model, space, batches), score(criterion, model, space, batches * 3)
        np.testing.assert_allclose(once, thrice)


def test_batches_are_read_once() -> None:
    model, space, batches = prepared("cnn", False)
    for criterion in BY_BATCHES:
        assert np.array_equal(score(criterion, model, space, iter(batches)), score(criterion, model, space, batches))


# --- batch norm scale


def test_the_scales_of_all_norms_behind_a_unit_are_averaged() -> None:
    model, space, _ = prepared("cnn", False)
    expected = [
        ((block.bn1.weight.abs() + block.bn2.weight.abs()) / 2).detach().numpy()
        for block in (model.get_submodule("first"), model.get_submodule("second"))
    ]
    np.testing.assert_allclose(score("bn-scale", model, space), np.concatenate(expected))


def test_a_group_without_batch_norm_is_refused_by_name() -> None:
    model, space, _ = prepared("vit", False)
    with pytest.raises(ImportanceError, match=r"blocks\.0\.attn has none: use taylor"):
        score("bn-scale", model, space)


def test_equal_scales_say_nothing() -> None:
    model, space, _ = prepared("cnn", False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, -0.5)
    with pytest.raises(ImportanceError, match="every batch norm scale is equal"):
        score("bn-scale", model, space)


# --- what is refused


@pytest.mark.parametrize("criterion", BY_BATCHES)
def test_no_batches_are_refused(criterion: Criterion) -> None:
    model, space, _ = prepared("cnn", False)
    with pytest.raises(ImportanceError, match=f"{criterion} needs .*one batch.*give some batches"):
        score(criterion, model, space, [])


def test_an_unknown_criterion_is_refused_with_the_known_ones() -> None:
    model, space, _ = two_layers()
    with pytest.raises(ImportanceError, match="no importance 'tailor', expected one of: random, l1"):
        score("tailor", model, space)  # type: ignore[arg-type]


@pytest.mark.parametrize("criterion", ["taylor", "snip", "synflow"])
def test_overflow_is_refused(criterion: Criterion) -> None:
    model, space, batches = two_layers()
    with torch.no_grad():
        model[1].weight.mul_(1e200)
        model[2].weight.mul_(1e200)
    with pytest.raises(ImportanceError, match=f"{criterion} .*overflow|{criterion} overflowed"):
        score(criterion, model, space, batches)


class Functional(nn.Module):
    """Uses the weights of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.up(x.flatten(1)), self.down.weight)


def test_inputs_that_cannot_be_seen_are_refused_but_gradients_are_not() -> None:
    model = Functional()
    space = find_units(model, (2, 2))
    batches = [Batch(torch.randn(2, 3, 2, 2), torch.tensor([0, 1]))]
    with pytest.raises(ImportanceError, match=r"cannot see what .* gives: the model uses the weights of down without"):
        score("activation", model, space, batches)
    assert (score("taylor", model, space, batches) > 0).all()


# --- what is left alone


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("fails", [False, True], ids=["fine", "failing"])
def test_the_model_is_left_as_it_was(criterion: Criterion, fails: bool) -> None:
    model, space, batches = prepared("cnn", False)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.full_like(parameter, number) if number % 4 == 0 else None
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    before = snapshot(model)
    state = torch.random.get_rng_state()
    if fails:
        batches = [*batches, Batch(torch.zeros(1, 5, 8, 8).double(), torch.tensor([0]))]
    if fails and criterion in ("activation", "taylor", "snip"):
        with pytest.raises(RuntimeError, match="channels"):
            score(criterion, model, space, batches)
    else:
        score(criterion, model, space, batches)
    assert_same(snapshot(model), before)
    assert torch.equal(torch.random.get_rng_state(), state)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {
            name: None if value.grad is None else value.grad.clone() for name, value in model.named_parameters()
        },
        "flags": [value.requires_grad for value in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("flags", "modes", "hooks"):
        assert found[key] == expected[key]
    for key in ("values", "gradients"):
        for name, value in expected[key].items():
            assert (found[key][name] is None) if value is None else torch.equal(found[key][name], value), name


@pytest.mark.parametrize("criterion", CRITERIA)
def test_frozen_weights_and_training_mode_change_nothing(criterion: Criterion) -> None:
    model, space, batches = prepared("cnn", False)
    expected = score(criterion, model, space, batches)
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert np.array_equal(score(criterion, model, space, batches), expected)


@pytest.mark.parametrize("criterion", BY_BATCHES)
def test_what_a_model_remembers_in_eval_mode_is_not_touched_by_it(criterion: Criterion) -> None:
    """LeViT keeps its attention biases between forward passes, whatever they were computed with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = levit.Levit(
            img_size=64, num_classes=4, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4), depth=(1, 1, 1)
        ).eval()
        for name, parameter in model.named_parameters():
            if "attention_biases" in name:
                nn.init.normal_(parameter)
        batches = [Batch(torch.randn(2, 3, 64, 64), torch.tensor([1, 2]))] * 2
    space = find_units(model, (64, 64))
    fresh = score(criterion, model, space, batches)
    with torch.no_grad():
        expected = model(batches[0].images)
    assert np.array_equal(score(criterion, model, space, batches), fresh)
    with torch.no_grad():
        assert torch.equal(model(batches[0].images), expected)
    copy.deepcopy(model)


def test_random_scores_are_a_matter_of_the_seed_alone() -> None:
    model, space, _ = prepared("cnn", True)
    first = score("random", model, space, seed=3)
    assert np.array_equal(first, score("random", model, space, seed=3))
    assert not np.array_equal(first, score("random", model, space, seed=4))
    assert ((first >= 0) & (first < 1)).all()
    assert len(set(first)) == len(space)


# --- normalisation and ranking


SPACE = prepared("cnn", False)[1]  # two groups, of 8 and 10 units
SCORES = st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 6)), min_size=18, max_size=18).map(np.array)


@given(SCORES, st.sampled_from(["none", "mean", "max", "l2"]))
def test_normalising_never_changes_the_order_inside_a_group(scores: NDArray[np.float64], how: Any) -> None:
    found = normalise(SPACE, scores, how)
    for before, after in zip(SPACE.split(scores), SPACE.split(found), strict=True):
        order = np.argsort(before, kind="stable")
        assert (np.diff(after[order]) >= 0).all()
        scale = {
            "none": 1.0,
            "mean": np.abs(after).mean(),
            "max": np.abs(after).max(),
            "l2": np.sqrt((after**2).mean()),
        }[how]
        if how != "none" and np.abs(before).max() > 0:
            assert scale == pytest.approx(1)
    assert np.array_equal(normalise(SPACE, np.zeros(18), how), np.zeros(18))


@given(SCORES, st.floats(1e-3, 1e3))
def test_normalised_scores_do_not_know_the_scale_of_a_group(scores: NDArray[np.float64], factor: float) -> None:
    scaled = scores.copy()
    scaled[:8] *= factor
    for how in ("mean", "max", "l2"):
        np.testing.assert_allclose(normalise(SPACE, scaled, how), normalise(SPACE, scores, how), rtol=1e-6, atol=1e-9)


def test_normalising_leaves_the_given_scores_alone() -> None:
    scores = np.arange(18.0)
    normalise(SPACE, scores, "mean")
    assert np.array_equal(scores, np.arange(18.0))


def test_ranks_count_from_the_best_of_each_group_and_ties_go_by_the_tiebreakers_then_by_index() -> None:
    scores = np.array([5, 7, 7, 7, 1, 0, 0, 0] + [1] * 10, dtype=float)
    first = np.array([0, 1, 2, 2, 0, 0, 0, 0] + [0] * 9 + [1], dtype=float)
    second = np.array([0, 0, 0, 0, 0, 0, 5, 0, *range(10)], dtype=float)
    assert rank(SPACE, scores).tolist() == [3, 0, 1, 2, 4, 5, 6, 7, *range(10)]
    assert rank(SPACE, scores, [first]).tolist() == [3, 2, 0, 1, 4, 5, 6, 7, *range(1, 10), 0]
    assert rank(SPACE, scores, [first, second]).tolist() == [3, 2, 0, 1, 4, 6, 5, 7, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


@given(SCORES)
def test_ranks_are_a_permutation_in_every_group_and_follow_the_scores(scores: NDArray[np.float64]) -> None:
    ranks = rank(SPACE, scores)
    for part, of_group in zip(SPACE.split(scores), SPACE.split(ranks), strict=True):
        assert sorted(of_group) == list(range(len(part)))
        assert (np.diff(part[np.argsort(of_group)]) <= 0).all()
