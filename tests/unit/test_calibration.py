"""The closed forms against slow, obvious references: by hand, by least squares, by brute-force refits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from kinprune.calibration import (
    ReconstructionLayer,
    batch_norms,
    closed_form,
    describe_layers,
    is_folded,
    reconstruct,
    reestimate_batch_norm,
    solve_head,
)
from kinprune.calibration.closed_form import _parts
from kinprune.calibration.head import (
    LONE_RIDGE,
    balanced_weights,
    best_inverse_temperature,
    class_mean_head,
    head_inputs,
    ridge_head,
)
from kinprune.calibration.least_squares import moments_of, solve_towards_zero
from kinprune.errors import TaskError, TrainingError
from kinprune.evaluation import evaluate, logits
from kinprune.preprocessing import Preprocessing, normalise
from kinprune.tasks import Split

PREPROCESSING = Preprocessing(image_size=(32, 32))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(count: int, seed: int = 0, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def model_of(name: str, seed: int = 0, classes: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        size = {"img_size": 32} if "vit" in name else {}
        model = timm.create_model(name, num_classes=classes, **size)
        for norm in batch_norms(model):
            # As if trained: otherwise every norm of a random model is the identity.
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def narrow(layer: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep only these outputs and inputs of a Linear or Conv2d, in place."""
    weight = layer.weight.data
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    if rows is not None and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.data[rows].clone())
    layer.weight = nn.Parameter(weight.clone())


def narrow_norm(norm: nn.Module, rows: Tensor) -> None:
    norm.weight, norm.bias = nn.Parameter(norm.weight.data[rows].clone()), nn.Parameter(norm.bias.data[rows].clone())
    norm.running_mean, norm.running_var = norm.running_mean[rows].clone(), norm.running_var[rows].clone()


def pruned_vit(dense: nn.Module, share: float = 0.5) -> tuple[nn.Module, list[str]]:
    """The first nodes of every MLP of a copy, and the names of the layers that lost inputs."""
    model = copy.deepcopy(dense)
    for block in model.blocks:
        kept = torch.arange(int(block.mlp.fc1.out_features * share))
        narrow(block.mlp.fc1, rows=kept)
        narrow(block.mlp.fc2, columns=kept)
    return model, [f"blocks.{i}.mlp.fc2" for i in range(len(model.blocks))]


def pruned_resnet(dense: nn.Module, share: float = 0.5) -> tuple[nn.Module, list[str]]:
    model = copy.deepcopy(dense)
    names = [name for name, module in model.named_modules() if type(module).__name__ == "BasicBlock"]
    for name in names:
        block = model.get_submodule(name)
        kept = torch.arange(int(block.conv1.out_channels * share))
        narrow(block.conv1, rows=kept)
        narrow_norm(block.bn1, kept)
        narrow(block.conv2, columns=kept)
    return model, [f"{name}.conv2" for name in names]


def twin_halves(tensor: Tensor) -> None:
    """Make the second half along the first dimension a copy of the first, in place."""
    half = len(tensor) // 2
    tensor.data[half : 2 * half] = tensor.data[:half]


def stripes(per_class: int, classes: int = 3, seed: int = 0) -> Split:
    """Noisy images of a class's own colour."""
    labels = torch.arange(classes).repeat(per_class)
    colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200]])[labels]
    images = colours.view(-1, 3, 1, 1) + noise(len(labels), seed).int() // 3 - 40
    return Split(images.clamp(0, 255).to(torch.uint8), labels)


# batch norm


def small_cnn() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1),
            nn.BatchNorm2d(4),
        )


def test_batch_norm_statistics_are_those_of_the_images() -> None:
    model, images = small_cnn(), noise(10)
    assert reestimate_batch_norm(model, images, PREPROCESSING) == 2
    with torch.no_grad():
        outputs = model[0](normalise(images, PREPROCESSING))
        assert torch.allclose(model[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(model[1].running_var, outputs.transpose(0, 1).flatten(1).var(1), rtol=1e-4)
        scaled = (outputs - outputs.mean((0, 2, 3), keepdim=True)) / (
            outputs.var((0, 2, 3), keepdim=True, correction=0) + model[1].eps
        ).sqrt()
        pooled = scaled.relu().mean((2, 3))
        assert torch.allclose(model[5].running_mean, pooled.mean(0), atol=1e-5)
        assert torch.allclose(model[5].running_var, pooled.var(0), rtol=1e-3)


def test_batches_are_averaged_equally_and_drawn_with_the_seed() -> None:
    images = noise(10)
    model = small_cnn()
    reestimate_batch_norm(model, images, PREPROCESSING, batch_size=5, seed=3)
    with torch.no_grad():
        whole = model[0](normalise(images, PREPROCESSING)).mean((0, 2, 3))
    assert torch.allclose(model[1].running_mean, whole, atol=1e-5)
    again, other = small_cnn(), small_cnn()
    reestimate_batch_norm(again, images, PREPROCESSING, batch_size=5, seed=3)
    reestimate_batch_norm(other, images, PREPROCESSING, batch_size=5, max_images=5, seed=4)
    assert torch.equal(again[1].running_var, model[1].running_var)
    assert not torch.equal(other[1].running_mean, model[1].running_mean)


def test_batch_norm_modes_momentum_and_counters_are_restored() -> None:
    model = small_cnn().train()
    model[1].eval()
    model[1].momentum, model[5].momentum = 0.25, 0.05
    model[1].num_batches_tracked.fill_(7)
    state = torch.get_rng_state()
    reestimate_batch_norm(model, noise(6), PREPROCESSING, batch_size=2)
    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert (model[1].momentum, model[5].momentum) == (0.25, 0.05)
    assert int(model[1].num_batches_tracked) == 7
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_of_single_images() -> None:
    model = small_cnn()
    before = model[5].running_var.clone()
    assert reestimate_batch_norm(model, noise(3), PREPROCESSING, batch_size=1) == 2
    assert bool(model[1].running_var.isfinite().all())
    assert not torch.equal(model[1].running_mean, torch.zeros(4))
    assert torch.equal(model[5].running_var, before), "a single value a channel has no variance"


def test_no_batch_norm_is_a_no_op_and_no_image_an_error() -> None:
    assert reestimate_batch_norm(model_of("test_vit"), noise(2), PREPROCESSING) == 0
    with pytest.raises(TaskError, match="on 0 images"):
        reestimate_batch_norm(small_cnn(), noise(0), PREPROCESSING)


def test_folded_norms_are_recognised_and_left_alone() -> None:
    model = small_cnn()
    model[1].bias.data.fill_(0.5)
    assert is_folded(model[1])
    assert not is_folded(model[5]), "a norm without a learned bias is fresh, not folded"
    assert reestimate_batch_norm(model, noise(4), PREPROCESSING) == 1
    assert torch.equal(model[1].running_mean, torch.zeros(4))


# the head


def features_of(n: int, d: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.arange(classes).repeat(2), torch.randint(0, classes, (n - 2 * classes,), generator=generator)]
    )
    centres = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    return centres[labels] + 1.5 * torch.randn(n, d, generator=generator, dtype=torch.float64) + 3, labels


def ridge_by_lstsq(features: Tensor, targets: Tensor, weights: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weighted ridge with a free intercept, as one stacked least-squares problem."""
    n, d = features.shape
    root = weights.sqrt().unsqueeze(1)
    rows = torch.cat([root * torch.cat([features, torch.ones(n, 1, dtype=features.dtype)], 1)])
    ridge = torch.cat([penalty**0.5 * torch.eye(d, dtype=features.dtype), torch.zeros(d, 1, dtype=features.dtype)], 1)
    stacked = torch.cat([root * targets, torch.zeros(d, targets.shape[1], dtype=features.dtype)])
    solution = torch.linalg.lstsq(torch.cat([rows, ridge]), stacked, driver="gelsd").solution
    return solution[:d].T, solution[d]


@pytest.mark.parametrize(("n", "d"), [(40, 6), (20, 50)])
@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_ridge_head_is_the_least_squares_solution(n: int, d: int, ridge: float) -> None:
    features, labels = features_of(n, d, 4)
    weight, bias, solution = ridge_head(features, labels, 4, [ridge])
    weights = balanced_weights(labels, 4)
    centred = weights.sqrt().unsqueeze(1) * (features - (weights.unsqueeze(1) * features).sum(0) / weights.sum())
    penalty = ridge * float(torch.linalg.matrix_norm(centred, 2)) ** 2
    targets = functional.one_hot(labels, 4).double()
    expected_weight, expected_bias = ridge_by_lstsq(features, targets, weights, penalty)
    assert torch.allclose(weight * solution.temperature, expected_weight, atol=1e-8)
    assert torch.allclose(bias * solution.temperature, expected_bias, atol=1e-8)

    left_out = torch.empty(n, 4, dtype=torch.float64)
    for index in range(n):
        others = torch.arange(n) != index
        each_weight, each_bias = ridge_by_lstsq(features[others], targets[others], weights[others], penalty)
        left_out[index] = each_weight @ features[index] + each_bias
    right = (left_out.argmax(1) == labels).double()
    assert solution.accuracy == pytest.approx(float((weights * right).sum() / weights.sum()))
    losses = functional.cross_entropy(left_out / solution.temperature, labels, reduction="none")
    assert solution.loss == pytest.approx(float((weights * losses).sum() / weights.sum()), rel=1e-6)


def test_the_ridge_of_least_left_out_loss_is_chosen() -> None:
    features, labels = features_of(30, 40, 3)
    ridges = [1e-6, 1e-3, 1e-1, 10.0]
    each = {ridge: ridge_head(features, labels, 3, [ridge])[2].loss for ridge in ridges}
    chosen = ridge_head(features, labels, 3, ridges)[2]
    assert chosen.loss == min(each.values())
    assert each[chosen.ridge] == chosen.loss


def test_class_means_left_out_one_by_one() -> None:
    features, labels = features_of(24, 8, 3)
    weight, bias, solution = class_mean_head(features, labels, 3)
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    nearest = torch.cdist(features, means).argmin(1)
    assert torch.equal((features @ weight.T + bias).argmax(1), nearest)
    right = []
    for index in range(24):
        others = torch.arange(24) != index
        without = torch.stack([features[others & (labels == label)].mean(0) for label in range(3)])
        right.append(float((features[index] - without).square().sum(1).argmin() == labels[index]))
    weights = balanced_weights(labels, 3)
    assert solution.accuracy == pytest.approx(float((weights * torch.tensor(right)).sum() / weights.sum()))


@pytest.mark.parametrize("method", ["ridge", "class-mean"])
def test_a_class_without_images_is_never_answered(method: str) -> None:
    features, labels = features_of(90, 8, 3)
    labels = labels * 2
    solve = ridge_head if method == "ridge" else class_mean_head
    weight, bias, solution = solve(features, labels, 6)
    answers = (features @ weight.T + bias).argmax(1)
    assert set(answers.tolist()) <= {0, 2, 4}
    assert solution.accuracy > 0.5


def test_classes_weigh_the_same_whatever_their_number_of_images() -> None:
    labels = torch.tensor([0] * 9 + [1])
    weights = balanced_weights(labels, 3)
    assert float(weights[:9].sum()) == pytest.approx(float(weights[9]))
    assert float(weights.mean()) == pytest.approx(1)


def test_temperature_is_the_best_of_a_fine_grid() -> None:
    features, labels = features_of(50, 3, 4)
    weights = balanced_weights(labels, 4)
    scores = torch.cat([features, -features[:, :1]], 1) / 100 + 0.02 * functional.one_hot(labels, 4)
    inverse, loss = best_inverse_temperature(scores, labels, weights)
    doubt = 1 / 52

    def smoothed(scale: float) -> float:
        each = functional.cross_entropy(scale * scores, labels, reduction="none", label_smoothing=doubt)
        return float((weights * each).sum() / weights.sum())

    assert smoothed(inverse) <= min(smoothed(10**exponent) for exponent in np.linspace(0, 3, 600)) + 1e-9
    assert 1.01 < inverse < 999
    assert loss == pytest.approx(
        float((weights * functional.cross_entropy(inverse * scores, labels, reduction="none")).sum() / weights.sum())
    )


def test_perfect_scores_do_not_ask_for_endless_confidence() -> None:
    inverse, _ = best_inverse_temperature(
        torch.eye(3, dtype=torch.float64).repeat(4, 1), torch.arange(3).repeat(4), torch.ones(12)
    )
    assert 1 < inverse < 10


@pytest.mark.parametrize("method", ["ridge", "class-mean"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_byobnet"])
def test_solved_head_with_one_image_a_class(name: str, method: str) -> None:
    model = model_of(name, classes=7)
    head = model.default_cfg["classifier"]
    images, labels = noise(4), torch.arange(4)
    solution = solve_head(model, head, images, labels, 4, PREPROCESSING, method=method)
    assert (solution.accuracy, solution.loss) == (None, None)
    assert solution.ridge == (LONE_RIDGE if method == "ridge" else None)
    assert model.get_submodule(head).out_features == model.num_classes == 4
    answers = logits(model, images, PREPROCESSING)
    assert answers.argmax(1).tolist() == [0, 1, 2, 3]


def test_one_lone_class_among_others() -> None:
    features, labels = features_of(12, 5, 3)
    labels = torch.cat([labels, torch.tensor([3])])
    features = torch.cat([features, features.new_full((1, 5), 20.0)])
    for solve in (ridge_head, class_mean_head):
        weight, bias, solution = solve(features, labels, 4)
        assert solution.accuracy is not None and 0 < solution.accuracy <= 1
        assert int((features @ weight.T + bias)[-1].argmax()) == 3


def test_dropout_before_the_head_stays_out() -> None:
    model = timm.create_model("test_resnet", num_classes=3, drop_rate=0.9).train()
    first, second = (head_inputs(model, "fc", noise(5), PREPROCESSING) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


def test_head_in_place_and_without_bias() -> None:
    model = model_of("test_resnet", classes=3)
    model.fc = nn.Linear(model.fc.in_features, 3, bias=False)
    weight = model.fc.weight
    split = stripes(4)
    solve_head(model, "fc", split.images, split.labels, 3, PREPROCESSING)
    assert model.fc.weight is weight and model.fc.bias is None
    features = head_inputs(model, "fc", split.images, PREPROCESSING)
    assert torch.equal((features @ weight.detach().double().T).argmax(1), split.labels)


def test_head_refusals() -> None:
    model = model_of("test_resnet", classes=3)
    images, labels = noise(3), torch.arange(3)
    with pytest.raises(TrainingError, match="no module 'nothing'"):
        solve_head(model, "nothing", images, labels, 3, PREPROCESSING)
    with pytest.raises(TrainingError, match="is a BasicBlock; expected a Linear"):
        solve_head(model, "layer1.0", images, labels, 3, PREPROCESSING)
    with pytest.raises(TaskError, match="labels run from 0 to 2; expected 0 to 1"):
        solve_head(model, "fc", images, labels, 2, PREPROCESSING)
    with pytest.raises(TaskError, match="3 images and 2 labels"):
        solve_head(model, "fc", images, labels[:2], 3, PREPROCESSING)
    with pytest.raises(TrainingError, match="'median'"):
        solve_head(model, "fc", images, labels, 3, PREPROCESSING, method="median")
    with pytest.raises(TrainingError, match="penalty above 0"):
        solve_head(model, "fc", images, labels, 3, PREPROCESSING, ridges=[0.0])
    model.conv1[0].weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        solve_head(model, "fc", images, labels, 3, PREPROCESSING)


# reconstruction


def stream_error(model: nn.Module, dense: nn.Module, images: Tensor) -> float:
    """How far the features before the classifier are from the dense model's, as a share of their size."""
    head = dense.default_cfg["classifier"]
    own, whole = (head_inputs(each, head, images, PREPROCESSING) for each in (model, dense))
    return float((own - whole).norm() / whole.norm())


def redundant(name: str) -> tuple[nn.Module, nn.Module, list[str]]:
    """A dense model whose second half of every block's units repeats the first, and what is left without it."""
    dense = model_of(name)
    for block in [module for module in dense.modules() if type(module).__name__ in ("Block", "BasicBlock")]:
        if hasattr(block, "mlp"):
            twin_halves(block.mlp.fc1.weight)
            twin_halves(block.mlp.fc1.bias)
        else:
            for tensor in (
                block.conv1.weight,
                block.bn1.weight,
                block.bn1.bias,
                block.bn1.running_mean,
                block.bn1.running_var,
            ):
                twin_halves(tensor)
    pruned, layers = pruned_vit(dense) if "vit" in name else pruned_resnet(dense)
    return dense, pruned, layers


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_redundant_units_are_made_up_for_exactly(name: str) -> None:
    dense, pruned, layers = redundant(name)
    images = noise(32)
    assert stream_error(pruned, dense, images) > 0.05
    results = reconstruct(pruned, dense, layers, images, PREPROCESSING, ridges=[1e-9])
    assert [result.name for result in results] == layers
    assert all(result.skipped is None and result.after < 1e-6 < result.before for result in results)
    assert stream_error(pruned, dense, images) < 1e-3


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_no_layer_ends_with_a_larger_error_and_the_stream_comes_closer(name: str) -> None:
    dense = model_of(name)
    pruned, layers = pruned_vit(dense, 0.6) if "vit" in name else pruned_resnet(dense, 0.6)
    images = noise(48)
    before = stream_error(pruned, dense, images)
    results = reconstruct(pruned, dense, layers, images, PREPROCESSING)
    assert all(result.after <= result.before for result in results)
    assert any(result.skipped is None for result in results)
    assert stream_error(pruned, dense, images) < before


def test_a_layer_is_the_ridge_regression_towards_its_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    pruned = copy.deepcopy(dense)
    kept = torch.arange(5)
    narrow(pruned[1], rows=kept)
    narrow(pruned[3], columns=kept)
    images = noise(60, side=4)
    start, bias = pruned[3].weight.detach().double().clone(), pruned[3].bias.detach().double().clone()
    with torch.no_grad():
        hidden = pruned[:3](normalise(images, PREPROCESSING)).double().flatten(0, 1)
        target = dense(normalise(images, PREPROCESSING)).double().flatten(0, 1)
    reconstruct(pruned, dense, ["3"], images, PREPROCESSING, ridges=[0.01])
    penalty = 0.01 * float((hidden - hidden.mean(0)).square().sum(0).mean())
    missing = target - hidden @ start.T - bias
    change, shift = ridge_by_lstsq(hidden, missing, torch.ones(len(hidden)).double(), penalty)
    assert torch.allclose(pruned[3].weight.double(), start + change, atol=1e-5)
    assert torch.allclose(pruned[3].bias.double(), bias + shift, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": (0, 2), "bias": False},
    ],
)
def test_convolutions_of_every_geometry(options: dict[str, object]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, **options))
    twin_halves(dense[0].weight)
    twin_halves(dense[0].bias)
    pruned = copy.deepcopy(dense)
    narrow(pruned[0], rows=torch.arange(3))
    narrow(pruned[2], columns=torch.arange(3))
    images = noise(20, side=12)
    reconstruct(pruned, dense, ["2"], images, PREPROCESSING, ridges=[1e-10])
    expected = dense[2].weight[:, :3] + dense[2].weight[:, 3:]
    assert torch.allclose(pruned[2].weight, expected, atol=1e-4)


def test_drawn_positions_suffice_and_are_seeded() -> None:
    dense, pruned, layers = redundant("test_resnet")
    images = noise(32)
    copies = [copy.deepcopy(pruned) for _ in range(3)]
    for model, seed in zip(copies, (0, 0, 1), strict=True):
        reconstruct(model, dense, layers, images, PREPROCESSING, ridges=[1e-6], max_rows=512, seed=seed)
    first, second, other = (model.get_submodule(layers[0]).weight for model in copies)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert stream_error(copies[0], dense, images) < 0.3 * stream_error(pruned, dense, images)


def test_the_stream_is_compensated_for_what_came_before() -> None:
    dense = model_of("test_vit")
    pruned, layers = pruned_vit(dense)
    pruned.blocks[0].mlp.fc2.bias.data += 1.0  # an error of the stream that only a later layer may take back
    plain, aware = copy.deepcopy(pruned), copy.deepcopy(pruned)
    images = noise(32)
    reconstruct(plain, dense, [ReconstructionLayer(layers[1])], images, PREPROCESSING)
    reconstruct(aware, dense, [layers[1]], images, PREPROCESSING)

    def after_block(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.forward_intermediates(normalise(images, PREPROCESSING), indices=[1], intermediates_only=True)[
                0
            ]

    whole = after_block(dense)
    assert (after_block(aware) - whole).norm() < 0.5 * (after_block(plain) - whole).norm()


def test_shortcuts_at_inputs_and_outputs_are_the_same_stream() -> None:
    dense = model_of("test_vit")
    pruned, _ = pruned_vit(dense)
    at_input = ReconstructionLayer("blocks.1.mlp.fc2", shortcut=("blocks.1.norm1", "input"))
    at_output = ReconstructionLayer("blocks.1.mlp.fc2", shortcut=("blocks.0", "output"))
    models = [copy.deepcopy(pruned) for _ in range(2)]
    for model, layer in zip(models, (at_input, at_output), strict=True):
        reconstruct(model, dense, [layer], noise(16), PREPROCESSING)
    first, second = (model.blocks[1].mlp.fc2.weight for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, pruned.blocks[1].mlp.fc2.weight)


def test_residual_streams_are_recognised() -> None:
    vit = describe_layers(model_of("test_vit"), ["blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.0.mlp.fc1"])
    assert [layer.shortcut for layer in vit] == [("blocks.0.norm1", "input"), ("blocks.0.norm2", "input"), None]
    resnet = model_of("resnet10t")
    first, second, inner = describe_layers(resnet, ["layer1.0.conv2", "layer2.0.conv2", "layer2.0.conv1"])
    assert (first.shortcut, first.through, first.scale) == (("layer1.0.conv1", "input"), None, "layer1.0.bn2") or (
        first.through == "layer1.0.downsample"
    )
    assert (second.shortcut, second.through) == (("layer2.0.conv1", "input"), "layer2.0.downsample")
    assert inner == ReconstructionLayer("layer2.0.conv1")
    mobile = describe_layers(model_of("mobilenetv2_035"), ["blocks.1.0.conv_pwl", "blocks.1.1.conv_pwl"])
    assert [layer.shortcut for layer in mobile] == [None, ("blocks.1.1.conv_pw", "input")]
    assert [layer.scale for layer in mobile] == ["blocks.1.0.bn3", "blocks.1.1.bn3"]
    given = ReconstructionLayer("blocks.0.mlp.fc2")
    assert describe_layers(model_of("test_vit"), [given]) == (given,)


def test_layers_that_cannot_be_solved_are_left_with_a_reason() -> None:
    dense = model_of("test_resnet")
    pruned, layers = pruned_resnet(dense)
    before = copy.deepcopy(pruned.state_dict())
    first = layers[0].replace("conv2", "conv1")
    skipped = reconstruct(pruned, dense, [first], noise(4), PREPROCESSING)[0]
    assert "outputs where the dense model has" in skipped.skipped
    half = tuple(range(len(pruned.get_submodule(first).weight)))
    solved = reconstruct(pruned, dense, [ReconstructionLayer(first, outputs=half)], noise(4), PREPROCESSING)[0]
    assert solved.before == pytest.approx(0, abs=1e-9), "the kept outputs of the first layer are the dense model's"
    alone = reconstruct(pruned, dense, layers[:1], noise(1), PREPROCESSING)[0]
    assert "at least two images" in alone.skipped
    norm = reconstruct(pruned, dense, [layers[0].replace("conv2", "bn1")], noise(4), PREPROCESSING)[0]
    assert "not a Linear or Conv2d" in norm.skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())


def test_grouped_unreached_and_repeated_layers_are_skipped() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped, self.twice, self.never = nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 3, 1), nn.Linear(2, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.twice(self.twice(self.grouped(inputs)))

    dense = Odd()
    results = reconstruct(copy.deepcopy(dense), dense, ["grouped", "twice", "never"], noise(4), PREPROCESSING)
    reasons = [result.skipped for result in results]
    assert "3 groups" in reasons[0] and "one call a forward" in reasons[1] and "never reaches" in reasons[2]


def test_reconstruction_refusals_and_modes() -> None:
    dense = model_of("test_vit").train()
    pruned, layers = pruned_vit(dense)
    with pytest.raises(TrainingError, match=r"pruned model has no layer 'blocks\.99'"):
        reconstruct(pruned, dense, ["blocks.99"], noise(2), PREPROCESSING)
    with pytest.raises(TaskError, match="0 images"):
        reconstruct(pruned, dense, layers, noise(0), PREPROCESSING)
    with pytest.raises(TrainingError, match="ridges"):
        reconstruct(pruned, dense, layers, noise(2), PREPROCESSING, ridges=[])
    reconstruct(pruned, dense, layers, noise(4), PREPROCESSING, memory_mb=1)
    assert dense.training and pruned.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pruned.modules())


def test_an_intercept_goes_into_the_norm_after_it() -> None:
    """A convolution without bias: the mean that removed channels took away comes back through its norm."""
    for folded in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dense = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5)).eval()
        dense[2].bias.data.uniform_(1, 2)
        dense[2].running_mean.fill_(0.0 if folded else 0.3)
        dense[0].weight.data[3] = 0  # a channel that is constant: all it does is an intercept
        dense[0].bias.data[3] = 2.0
        pruned = copy.deepcopy(dense)
        narrow(pruned[0], rows=torch.arange(3))
        narrow(pruned[1], columns=torch.arange(3))
        layer = ReconstructionLayer("1", scale="2")
        images = noise(8, side=6)
        reconstruct(pruned, dense, [layer], images, PREPROCESSING, ridges=[1e-9])
        inputs = normalise(images, PREPROCESSING)
        assert torch.allclose(pruned(inputs), dense(inputs), atol=1e-4)
        assert is_folded(pruned[2]) == folded


# all of it


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_closed_form_keeps_the_best_of_its_starts(name: str) -> None:
    dense = model_of(name)
    pruned, layers = pruned_vit(dense) if "vit" in name else pruned_resnet(dense)
    split, head = stripes(8), dense.default_cfg["classifier"]
    bare, whole = copy.deepcopy(pruned), copy.deepcopy(pruned)
    alone = closed_form(bare, head, split.images, split.labels, 3, PREPROCESSING)
    both = closed_form(whole, head, split.images, split.labels, 3, PREPROCESSING, dense=dense, layers=layers)
    assert alone.layers == () and not alone.reconstructed
    assert [layer.name for layer in both.layers] == layers
    assert both.head.loss <= alone.head.loss
    assert evaluate(whole, stripes(8, seed=1), PREPROCESSING).accuracy > 0.9
    assert min(both.seconds_reconstruction, both.seconds_head) > 0
    again = copy.deepcopy(pruned)
    closed_form(again, head, split.images, split.labels, 3, PREPROCESSING, dense=dense, layers=layers)
    assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_the_head_that_stays_is_solved_on_all_images() -> None:
    dense = model_of("test_resnet")
    pruned, layers = pruned_resnet(dense)
    split, head = stripes(20), dense.default_cfg["classifier"]  # half of them judge
    found = closed_form(pruned, head, split.images, split.labels, 3, PREPROCESSING, dense=dense, layers=layers)
    left = pruned.get_submodule(head).weight.clone()
    solution = solve_head(pruned, head, split.images, split.labels, 3, PREPROCESSING)
    assert found.head.images == solution.images == 60 and found.head.ridge == solution.ridge
    torch.testing.assert_close(pruned.get_submodule(head).weight, left, rtol=1e-4, atol=1e-5)


def test_closed_form_with_one_image_a_class_keeps_the_reconstruction() -> None:
    dense = model_of("test_resnet")
    pruned, layers = pruned_resnet(dense)
    split = stripes(1)
    result = closed_form(pruned, "fc", split.images, split.labels, 3, PREPROCESSING, dense=dense, layers=layers)
    assert result.reconstructed and result.batch_norms == 0 and result.head.accuracy is None
    assert evaluate(pruned, split, PREPROCESSING).accuracy == 1


def test_a_head_surely_beats_another_where_chance_seldom_would() -> None:
    """A mean gain of 0.1 with a deviation of 0.2 over n images: two standard errors are 0.4 / root n."""
    split = stripes(2)
    solved = solve_head(model_of("test_resnet"), "fc", split.images, split.labels, 3, PREPROCESSING)
    assert solved.losses.shape == (6,) and solved.loss == pytest.approx(float(solved.losses.mean()))
    for images, sure in ((14, False), (18, True)):
        sides = torch.tensor([1.0, -1.0] * (images // 2), dtype=torch.float64)
        gains = 0.1 + 0.2 * sides / sides.std()
        worse = replace(solved, losses=torch.ones(images, dtype=torch.float64))
        better = replace(solved, losses=1 - gains)
        assert better.surely_beats(worse) == sure
        assert not worse.surely_beats(better) and not worse.surely_beats(worse)
    nobody = replace(solved, losses=torch.empty(0, dtype=torch.float64))
    assert not nobody.surely_beats(nobody)


def test_so_few_images_leave_a_model_as_it_was_trained() -> None:
    dense = model_of("test_resnet")
    for shots, tried in ((1, False), (15, False), (16, True)):
        pruned, layers = pruned_resnet(dense)
        before = {name: tensor.clone() for name, tensor in pruned.state_dict().items() if not name.startswith("fc.")}
        split = stripes(shots)
        result = closed_form(
            pruned, "fc", split.images, split.labels, 3, PREPROCESSING, dense=dense, layers=layers, intact=True
        )
        assert bool(result.layers) == tried and (result.head.accuracy is not None) == (shots > 1)
        if not tried:
            after = pruned.state_dict()
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
            assert not result.reconstructed and result.batch_norms == 0 and result.trainable is None


def test_real_weights_on_real_signs(shared: Path) -> None:
    """ViT-tiny at 96 px, 30 % of its MLP nodes, 10 images of each of 5 signs: far above chance without a step."""
    size = Preprocessing(image_size=(96, 96), mean=(0.5,) * 3, std=(0.5,) * 3)
    weights, folder = shared / "weights" / "vit_tiny_patch16_224.safetensors", shared / "data" / "sign-digits"
    if not weights.is_file() or not folder.is_dir():
        pytest.skip(f"no {weights.name} or no sign-digits under {shared}")
    dense = timm.create_model("vit_tiny_patch16_224", img_size=96)
    dense.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(load_file(weights), dense))
    pixels, labels = [], []
    for label in range(5):
        for path in sorted((folder / str(label)).iterdir())[:20]:
            pixels.append(np.asarray(Image.open(path).convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)))
            labels.append(label)
    images, targets = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)
    train = torch.arange(100) % 2 == 0
    pruned, layers = pruned_vit(dense, 0.3)
    head = closed_form(pruned, "head", images[train], targets[train], 5, size, dense=dense, layers=layers).head
    result = evaluate(pruned, Split(images[~train], targets[~train]), size)
    assert result.accuracy > 0.4 and head.accuracy > 0.4, "chance is 0.2"
    assert abs(result.loss - head.loss) < 0.8, "the leave-one-out temperature is meant to carry over"


# least squares


def test_inputs_that_are_zero_in_one_half_of_the_images_are_borne() -> None:
    rows = torch.arange(1.0, 9.0, dtype=torch.float64).view(4, 2)
    halves = moments_of(torch.zeros_like(rows), rows), moments_of(rows, rows)
    found = solve_towards_zero(halves, (0.1,), intercept=False)
    assert isinstance(found, str) or bool(found.weight.isfinite().all() and found.bias.isfinite().all())


# what starts are made of


def test_images_that_judge_make_no_start_where_there_are_enough() -> None:
    labels = torch.arange(3).repeat(40)
    judges, builders = _parts(labels, 3, seed=0)
    assert sorted([*judges.tolist(), *builders.tolist()]) == list(range(120))
    assert labels[judges].bincount().tolist() == [20, 20, 20]
    again, _ = _parts(labels, 3, seed=0)
    other, _ = _parts(labels, 3, seed=1)
    assert torch.equal(judges, again) and not torch.equal(judges, other)


def test_a_class_of_few_images_has_them_do_both() -> None:
    labels = torch.tensor([0] * 40 + [1] * 15)
    judges, builders = _parts(labels, 2, seed=0)
    assert judges.tolist() == builders.tolist() == list(range(55))
