"""Fine-tuning: it learns, is the same twice, and never ends below its start, whatever goes wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from kinprune.calibration import batch_norms, closed_form, reestimate_batch_norm
from kinprune.errors import TaskError, TrainingError
from kinprune.evaluation import evaluate, logits
from kinprune.preprocessing import Preprocessing
from kinprune.tasks import Split
from kinprune.training import Recipe, TrainingResult, fine_tune, hold_back
from kinprune.training.batches import batches, shift_and_flip
from kinprune.training.loop import CurvePoint, judge
from kinprune.training.recipe import default_rate, make_optimiser, optimiser_name, resolve_precision, schedule

PREPROCESSING = Preprocessing(image_size=(32, 32))
QUICK = Recipe(steps=8, batch_size=16, precision="float32")
ABSURD = 1e4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stripes(per_class: int, classes: int = 3, seed: int = 0) -> Split:
    """Noisy images of a class's own colour."""
    labels = torch.arange(classes).repeat(per_class)
    colours = torch.tensor([[150, 110, 110], [110, 150, 110], [110, 110, 150], [130, 130, 90]])[labels]
    generator = torch.Generator().manual_seed(seed)
    images = colours.view(-1, 3, 1, 1) + torch.randint(-90, 90, (len(labels), 3, 32, 32), generator=generator)
    return Split(images.clamp(0, 255).to(torch.uint8), labels)


def model_of(name: str, classes: int = 3, **options: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if "vit" in name:
            options["img_size"] = 32
        return timm.create_model(name, num_classes=classes, **options)


def solved(name: str, split: Split) -> nn.Module:
    """A model at its closed-form start."""
    model = model_of(name)
    closed_form(model, model.default_cfg["classifier"], split.images, split.labels, 3, PREPROCESSING)
    return model


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


# learning


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_byobnet", "test_efficientnet", "test_convnext"])
def test_every_kind_of_model_learns(name: str) -> None:
    split = stripes(20)
    model = model_of(name)
    recipe = Recipe(steps=30, batch_size=16, learning_rate=0.05 if batch_norms(model) else 3e-3)
    before = evaluate(model, split, PREPROCESSING)
    result = fine_tune(model, split, PREPROCESSING, recipe)
    after = evaluate(model, stripes(10, seed=1), PREPROCESSING)
    assert after.accuracy > max(0.6, before.accuracy)
    assert result.losses[-1] < result.losses[0]
    assert len(result.losses) == 30 and result.images_seen == 30 * 16
    assert [point.step for point in result.curve] == [0, 8, 15, 22, 30]
    assert not result.stopped and result.guard == "held-back" and result.seconds > 0
    assert result.optimiser == ("sgd" if batch_norms(model) else "adamw")
    assert not any(module.training for module in model.modules())


def test_the_same_seed_gives_the_same_model_and_leaves_the_random_state() -> None:
    split = stripes(8)
    models, results = [], []
    for seed, noise in ((0, 1), (0, 2), (5, 3)):
        model = model_of("test_vit", drop_path_rate=0.3, proj_drop_rate=0.2)
        torch.manual_seed(noise)  # the seed in force outside must not matter
        before = torch.get_rng_state()
        recipe = Recipe(steps=6, batch_size=8, learning_rate=1e-3, seed=seed)
        results.append(fine_tune(model, split, PREPROCESSING, recipe, held_back=stripes(4, seed=9)))
        assert torch.equal(torch.get_rng_state(), before)
        models.append(state_of(model))
    assert same(models[0], models[1]) and results[0].losses == results[1].losses
    assert results[0].losses != results[2].losses


def test_weights_stay_in_the_usual_layout() -> None:
    model = model_of("test_resnet")
    fine_tune(model, stripes(6), PREPROCESSING, QUICK)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_frozen_parameters_stay() -> None:
    model = model_of("test_vit")
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    before = state_of(model)
    fine_tune(model, stripes(8), PREPROCESSING, Recipe(steps=8, batch_size=8, learning_rate=0.05))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"}
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter"):
        fine_tune(model, stripes(8), PREPROCESSING, QUICK)


@pytest.mark.parametrize("mode", ["batch", "frozen"])
def test_batch_norm_statistics_follow_the_recipe(mode: str) -> None:
    model = model_of("test_resnet")
    before = state_of(model)
    recipe = Recipe(steps=6, batch_size=16, learning_rate=0.05, batch_norm=mode)
    result = fine_tune(model, stripes(10), PREPROCESSING, recipe)
    assert result.best_step > 0
    means = [name for name in before if name.endswith("running_mean")]
    assert all(torch.equal(model.state_dict()[name], before[name]) == (mode == "frozen") for name in means)


def test_folded_norms_stay_frozen_whatever_the_recipe_says() -> None:
    model = model_of("test_resnet")
    norms = batch_norms(model)
    norms[0].bias.data.fill_(0.3)
    fine_tune(model, stripes(10), PREPROCESSING, Recipe(steps=6, batch_size=16, learning_rate=0.05, batch_norm="batch"))
    assert float(norms[0].running_mean.abs().max()) == 0
    assert float(norms[1].running_mean.abs().max()) > 0


def test_a_teacher_is_followed() -> None:
    split, other = stripes(12), stripes(12, seed=3)
    teacher = model_of("test_resnet")
    fine_tune(teacher, split, PREPROCESSING, Recipe(steps=30, batch_size=16, learning_rate=0.05))
    frozen = state_of(teacher)
    teacher.train()

    def distance(share: float) -> float:
        student = model_of("test_vit")
        recipe = Recipe(
            steps=20, batch_size=16, learning_rate=1e-3, distillation=share, hold_back=0, augmentation="none"
        )
        shuffled = Split(split.images, split.labels.roll(1))  # the labels are wrong: only the teacher tells the truth
        fine_tune(student, shuffled, PREPROCESSING, recipe, teacher=teacher, held_back=split)
        taught, learned = (logits(model, other.images, PREPROCESSING).softmax(1) for model in (teacher, student))
        return float((taught - learned).abs().sum(1).mean())

    assert distance(1.0) < 0.7 * distance(0.0)
    assert same(state_of(teacher), frozen)
    with pytest.raises(TrainingError, match="teacher answers 4 classes and the model 3"):
        fine_tune(model_of("test_vit"), split, PREPROCESSING, QUICK, teacher=model_of("test_vit", classes=4))


@pytest.mark.parametrize("hold_back", [0.0, 0.2])
def test_answers_teach_as_the_teacher_who_gave_them(hold_back: float) -> None:
    train, guard = stripes(12), stripes(4, seed=9) if hold_back else None
    teacher = solved("test_resnet", train)
    answers = logits(teacher, train.images, PREPROCESSING)
    recipe = Recipe(
        steps=6, batch_size=12, learning_rate=1e-3, precision="float32", augmentation="none", hold_back=hold_back
    )
    asked, told = model_of("test_vit"), model_of("test_vit")
    first = fine_tune(asked, train, PREPROCESSING, recipe, held_back=guard, teacher=teacher)
    second = fine_tune(told, train, PREPROCESSING, recipe, held_back=guard, answers=answers)
    assert first.losses == pytest.approx(second.losses, rel=1e-5)
    alone = fine_tune(model_of("test_vit"), train, PREPROCESSING, recipe, held_back=guard)
    assert alone.losses != pytest.approx(second.losses, rel=1e-2)


def test_answers_that_do_not_belong_to_the_images_are_refused() -> None:
    train, held = stripes(6), stripes(2, seed=9)
    teacher = model_of("test_resnet")
    answers = logits(teacher, train.images, PREPROCESSING)
    before = state_of(model := model_of("test_vit"))
    with pytest.raises(TrainingError, match="18 answers of a teacher and 15 images to train on"):
        fine_tune(model, train, PREPROCESSING, QUICK, answers=answers)  # three images were held back
    with pytest.raises(TrainingError, match="17 answers of a teacher and 18 images"):
        fine_tune(model, train, PREPROCESSING, QUICK, answers=answers[1:], held_back=held)
    with pytest.raises(TrainingError, match="both given"):
        fine_tune(model, train, PREPROCESSING, QUICK, answers=answers, teacher=teacher, held_back=held)
    with pytest.raises(TrainingError, match="teacher answers 2 classes and the model 3"):
        fine_tune(model, train, PREPROCESSING, QUICK, answers=answers[:, :2], held_back=held)
    assert same(state_of(model), before)


# never below the start


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_learning_rate_that_explodes_ends_at_the_start(name: str) -> None:
    split = stripes(12)
    train, held = hold_back(split, 0.3, 0)
    assert held is not None
    model = solved(name, train)
    before, start = state_of(model), evaluate(model, held, PREPROCESSING)
    recipe = Recipe(steps=8, batch_size=16, learning_rate=ABSURD, optimiser="sgd", clip_norm=None, warmup=0)
    with pytest.raises(TrainingError, match=r"learning rate \d{4}.*that of step 0"):
        fine_tune(model, train, PREPROCESSING, recipe, held_back=held)
    assert same(state_of(model), before)
    assert evaluate(model, held, PREPROCESSING).accuracy == start.accuracy


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_learning_rate_that_destroys_ends_at_the_start(name: str) -> None:
    train, held = hold_back(stripes(12), 0.3, 0)
    assert held is not None
    model = solved(name, train)
    before = state_of(model)
    recipe = Recipe(steps=3, batch_size=16, learning_rate=300.0, optimiser="sgd", warmup=0, evaluations=3)
    result = fine_tune(model, train, PREPROCESSING, recipe, held_back=held)
    assert min(point.accuracy for point in result.curve) < result.curve[0].accuracy - 0.2, "it did destroy"
    assert result.best_step == 0 and same(state_of(model), before)


@pytest.mark.parametrize("seed", range(3))
def test_the_end_is_never_worse_than_the_start_on_the_guard(seed: int) -> None:
    train, held = hold_back(stripes(8, seed=seed), 0.4, seed)
    assert held is not None
    model = solved("test_resnet", train)
    recipe = Recipe(steps=12, batch_size=8, learning_rate=0.3, evaluations=6, seed=seed)
    result = fine_tune(model, train, PREPROCESSING, recipe, held_back=held)
    end = judge(model, held, PREPROCESSING, 12)
    kept = next(point for point in result.curve if point.step == result.best_step)
    assert end.accuracy == kept.accuracy and end.loss == pytest.approx(kept.loss, rel=1e-4)
    assert end.calibrated == pytest.approx(min(point.calibrated for point in result.curve), rel=1e-4)
    assert end.loss == pytest.approx(evaluate(model, held, PREPROCESSING).loss, rel=1e-4)


def test_a_state_is_judged_under_the_temperature_that_suits_it() -> None:
    """Two images, one right and one wrong, each surely: answers scaled by any factor of the grid are as good."""
    split = Split(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]))

    class Fixed(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.answers = nn.Parameter(scale * torch.tensor([[3.0, 0.0], [0.5, 0.0]]))

        def forward(self, images: Tensor) -> Tensor:
            return self.answers

    found = {scale: judge(Fixed(scale), split, PREPROCESSING, 0) for scale in (1.0, 2.0)}
    for scale, point in found.items():
        right, wrong = math.log(1 + math.exp(-3 * scale)), math.log(1 + math.exp(0.5 * scale))
        assert point.accuracy == 0.5 and point.loss == pytest.approx((right + wrong) / 2)
    assert found[1.0].calibrated == pytest.approx(found[2.0].calibrated)
    assert found[2.0].calibrated < found[2.0].loss


def test_the_state_of_least_calibrated_loss_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted judgements: the choice among states, apart from any training."""

    def chosen(*losses: float) -> int:
        script = iter(losses)
        monkeypatch.setattr(
            "kinprune.training.loop.judge",
            lambda *_, **__: CurvePoint(_[-1], accuracy=0.5, loss=9.0, calibrated=next(script)),
        )
        recipe = Recipe(steps=len(losses) - 1, batch_size=2, evaluations=len(losses) - 1)
        held = Split(*(tensor[:10] for tensor in (stripes(4).images, stripes(4).labels)))
        return fine_tune(model_of("test_vit"), stripes(2), PREPROCESSING, recipe, held_back=held).best_step

    assert chosen(1.0, 0.8, 0.7, 0.9) == 2
    assert chosen(1.0, 1.0) == 0
    assert chosen(1.0, math.inf) == 0
    assert chosen(math.inf, 2.0) == 1


def test_a_non_finite_loss_names_step_and_rate_and_puts_the_best_back() -> None:
    split = stripes(8)
    model = solved("test_vit", split)
    before = state_of(model)

    def poison(step: int, steps: int, loss: float) -> None:
        if step == 2:
            model.head.weight.data.fill_(float("inf"))

    recipe = Recipe(steps=5, batch_size=8, learning_rate=0.25, evaluations=1, warmup=0)
    with pytest.raises(TrainingError, match=r"nan at step 3 of 5 \(learning rate 0\.\d+\).*that of step 0"):
        fine_tune(model, split, PREPROCESSING, recipe, on_step=poison)
    assert same(state_of(model), before)
    assert not model.training


def test_interrupting_keeps_the_best_so_far() -> None:
    split = stripes(20)
    reference, model = model_of("test_resnet"), model_of("test_resnet")
    seen: list[tuple[int, int, float]] = []
    states: dict[int, dict[str, Tensor]] = {}

    def interrupt(step: int, steps: int, loss: float) -> None:
        seen.append((step, steps, loss))
        states[step] = state_of(model)
        if step == 9:
            raise KeyboardInterrupt

    recipe = Recipe(steps=16, batch_size=16, learning_rate=0.05, evaluations=4)
    result = fine_tune(model, split, PREPROCESSING, recipe, on_step=interrupt)
    assert result.stopped and [step for step, _, _ in seen] == list(range(1, 10))
    assert result.losses == tuple(loss for _, _, loss in seen) and seen[0][1] == 16
    assert [point.step for point in result.curve] == [0, 4, 8]
    assert result.best_step in (4, 8), "the model learns, so its start is not the best"
    assert same(state_of(model), states[result.best_step])
    assert not same(state_of(model), reference.state_dict())
    assert not model.training


def test_an_error_in_the_callback_passes_but_leaves_the_best_state() -> None:
    model = model_of("test_vit")
    before = state_of(model)

    def fail(step: int, steps: int, loss: float) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fine_tune(model, stripes(4), PREPROCESSING, QUICK, on_step=fail)
    assert same(state_of(model), before)


# little data


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_byobnet"])
def test_one_image_a_class_is_guarded_by_the_training_loss(name: str) -> None:
    split = stripes(1)
    model = solved(name, split)
    result = fine_tune(model, split, PREPROCESSING, Recipe(steps=4, batch_norm="batch"))
    assert result.guard == "training"
    assert result.images_seen == 4 * 3, "a batch is all there is"
    assert min(point.calibrated for point in result.curve) == next(
        point.calibrated for point in result.curve if point.step == result.best_step
    )
    assert judge(model, split, PREPROCESSING, 4).calibrated <= result.curve[0].calibrated + 1e-6


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_single_image_trains_through_batch_norm(batch_size: int) -> None:
    split = Split(stripes(1).images[:1], torch.tensor([0]))
    model = model_of("test_byobnet")
    result = fine_tune(model, split, PREPROCESSING, Recipe(steps=3, batch_size=batch_size, batch_norm="batch"))
    assert len(result.losses) == 3 and all(math.isfinite(loss) for loss in result.losses)


def test_holding_back_is_stratified_and_seeded() -> None:
    split = Split(
        torch.arange(34).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).to(torch.uint8),
        torch.tensor([0] * 20 + [2] * 12 + [3] * 2),
    )
    train, held = hold_back(split, 0.25, 0)
    assert held is not None
    assert torch.bincount(held.labels).tolist() == [5, 0, 3, 1]
    together = torch.cat([train.images, held.images])[:, 0, 0, 0].sort().values
    assert together.tolist() == list(range(34))
    assert torch.equal(hold_back(split, 0.25, 0)[1].images, held.images)
    assert not torch.equal(hold_back(split, 0.25, 1)[1].images, held.images)
    assert hold_back(split, 0.0, 0) == (split, None)
    lonely = Split(split.images[:3], torch.tensor([0, 0, 1]))
    assert hold_back(lonely, 0.5, 0) == (lonely, None)
    _, most = hold_back(split, 0.99, 0)
    assert torch.bincount(most.labels).tolist() == [19, 0, 11, 1], "an image of each class stays to train on"


def test_no_step_is_a_no_op() -> None:
    model = model_of("test_vit").train()
    before = state_of(model)
    result = fine_tune(model, stripes(4), PREPROCESSING, Recipe(steps=0))
    assert (result.losses, result.curve, result.best_step, result.images_seen) == ((), (), 0, 0)
    assert same(state_of(model), before)
    assert not model.training


# the parts


def test_batches_are_without_replacement_in_each_pass() -> None:
    drawn = batches(10, 3, torch.Generator().manual_seed(0))
    for _ in range(4):
        whole = torch.cat([next(drawn) for _ in range(3)])
        assert len(whole) == len(set(whole.tolist())) == 9
    everything = batches(4, 4, torch.Generator().manual_seed(0))
    assert sorted(next(everything).tolist()) == [0, 1, 2, 3]


def test_the_schedule_rises_and_falls_to_almost_nothing() -> None:
    rates = [schedule(step, 60, 0.1) for step in range(1, 61)]
    assert rates[:7] == pytest.approx([1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1])
    assert all(first >= second for first, second in pairwise(rates[6:]))
    assert 0 < rates[-1] < 0.01
    assert schedule(1, 1, 0.1) == 1
    assert [schedule(step, 3, 1.0) for step in (1, 2, 3)] == pytest.approx([0.25, 0.5, 0.75])


def test_shifts_are_those_of_reflect_padding_each_image_its_own() -> None:
    images = torch.randint(0, 256, (40, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moved = shift_and_flip(images, torch.Generator().manual_seed(1), flip=False)
    assert moved.shape == images.shape and moved.dtype == torch.uint8
    padded = functional.pad(images.float(), (3, 3, 2, 2), mode="reflect").to(torch.uint8)
    found = set()
    for image, source in zip(moved, padded, strict=True):
        windows = {(y, x): source[:, y : y + 16, x : x + 24] for y in range(5) for x in range(7)}
        found.add(next(offset for offset, window in windows.items() if torch.equal(window, image)))
    assert len(found) > 10
    again = shift_and_flip(images, torch.Generator().manual_seed(1), flip=False)
    assert torch.equal(moved, again)


def test_flips_only_where_asked() -> None:
    images = torch.arange(4, dtype=torch.uint8).view(1, 1, 1, 4).expand(50, 3, 1, 4)
    flipped = shift_and_flip(images, torch.Generator().manual_seed(0), flip=True)[:, 0, 0].tolist()
    assert {tuple(row) for row in flipped} == {(0, 1, 2, 3), (3, 2, 1, 0)}
    assert torch.equal(shift_and_flip(images, torch.Generator().manual_seed(0), flip=False), images)


def test_learning_rates_decay_away_from_the_head_and_biases_are_not_decayed() -> None:
    for name, first, head in (
        ("test_vit", "patch_embed.proj.weight", "head.weight"),
        ("test_resnet", "conv1.0.weight", "fc.weight"),
    ):
        model = model_of(name)
        names = {parameter: key for key, parameter in model.named_parameters()}
        optimiser = make_optimiser(
            model, Recipe(layer_decay=0.5, weight_decay=0.1), optimiser_name(model, Recipe()), 1.0
        )
        groups = {names[parameter]: group for group in optimiser.param_groups for parameter in group["params"]}
        assert set(groups) == set(names.values())
        assert groups[head]["lr_scale"] == 1.0 and groups[first]["lr_scale"] <= 0.25
        assert all((group["weight_decay"] == 0) == (names_are_spared(key, model)) for key, group in groups.items())


def names_are_spared(name: str, model: nn.Module) -> bool:
    return model.get_parameter(name).ndim < 2 or name in ("pos_embed", "cls_token")


def test_precision_is_what_was_asked_or_what_the_processor_does_natively() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision(Recipe(precision="float32"), cpu) == "float32"
    assert resolve_precision(Recipe(precision="bfloat16"), cpu) == "bfloat16"
    automatic = resolve_precision(Recipe(), cpu)
    native = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    assert automatic == ("bfloat16" if native.get("avx512_bf16") or native.get("amx_bf16") else "float32")


def test_bfloat16_learns_too() -> None:
    model = model_of("test_resnet")
    recipe = Recipe(steps=20, batch_size=16, learning_rate=0.05, precision="bfloat16")
    result: TrainingResult = fine_tune(model, stripes(20), PREPROCESSING, recipe)
    assert result.precision == "bfloat16" and result.losses[-1] < 0.7 * result.losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_on_a_gpu_from_start_to_end(name: str) -> None:
    split = stripes(12)
    model, dense = model_of(name).cuda(), model_of(name).cuda()
    layer = {"test_vit": "blocks.1.mlp.fc2", "test_resnet": "layer2.0.conv2"}[name]
    head = model.default_cfg["classifier"]
    closed_form(model, head, split.images, split.labels, 3, PREPROCESSING, dense=dense, layers=[layer])
    before = torch.cuda.get_rng_state()
    result = fine_tune(model, split, PREPROCESSING, Recipe(steps=10, batch_size=16), device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert len(result.losses) == 10 and evaluate(model, split, PREPROCESSING).accuracy > 0.6
    assert next(model.parameters()).is_cuda


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1),
        ("steps", 2.5),
        ("batch_size", 0),
        ("evaluations", 0),
        ("seed", True),
        ("optimiser", "lion"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("momentum", 1.0),
        ("warmup", 1.5),
        ("layer_decay", 0.0),
        ("batch_norm", "off"),
        ("label_smoothing", 1.0),
        ("augmentation", "heavy"),
        ("flip", "yes"),
        ("precision", "float16"),
        ("clip_norm", 0),
        ("hold_back", 1.0),
        ("distillation", 2),
        ("distillation_temperature", 0),
    ],
)
def test_recipes_that_make_no_sense_are_refused(name: str, value: object) -> None:
    with pytest.raises(TrainingError, match=rf"the recipe's {name} is .*; expected"):
        Recipe(**{name: value})


def test_tasks_that_do_not_fit_the_model_are_refused() -> None:
    model = model_of("test_vit")
    with pytest.raises(TaskError, match="labels run from 0 to 3 but the model answers 3 classes"):
        fine_tune(model, stripes(2, classes=4), PREPROCESSING, QUICK)
    with pytest.raises(TaskError, match="0 images"):
        fine_tune(model, Split(stripes(1).images[:0], torch.empty(0, dtype=torch.int64)), PREPROCESSING, QUICK)
    with pytest.raises(TaskError, match="no image"):
        fine_tune(
            model,
            stripes(2),
            PREPROCESSING,
            QUICK,
            held_back=Split(stripes(1).images[:0], torch.empty(0, dtype=torch.int64)),
        )


def test_a_state_is_judged_with_batch_norms_counted_on_the_training_images() -> None:
    split = stripes(20)
    train, held = hold_back(split, 0.2, 0)
    model = model_of("test_resnet")
    recipe = Recipe(steps=30, batch_size=16, learning_rate=0.05, optimiser="sgd", evaluations=1)
    result = fine_tune(model, train, PREPROCESSING, recipe, held_back=held)
    assert result.best_step == 30
    left = state_of(model)
    reestimate_batch_norm(model, train.images, PREPROCESSING, max_images=256, seed=recipe.seed)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, left[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "adamw", "sgd"),
    [
        (1, 3e-5, 0.03),
        (15, 3e-5, 0.03),
        (30, 5e-5, 0.03),
        (60, 1e-4, 0.03),
        (240, 2e-4, 0.06),
        (9999, 5e-4, 0.1),
    ],
)
def test_rates_follow_the_number_of_steps(steps: int, adamw: float, sgd: float) -> None:
    assert default_rate("adamw", steps) == pytest.approx(adamw)
    assert default_rate("sgd", steps) == pytest.approx(sgd)
