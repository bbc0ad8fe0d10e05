"""Fine-tuning under a limit of memory: it holds as measured, teaches the same, and says what was done for it."""

from __future__ import annotations

import copy
import json
import mmap
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import kinprune as kp
from kinprune.calibration import batch_norms
from kinprune.errors import TrainingError
from kinprune.preprocessing import Preprocessing
from kinprune.tasks import Split
from kinprune.training import Recipe, TrainingResult, fine_tune, least_limit
from kinprune.training.allocation import live_peak
from kinprune.training.freezing import pieces
from kinprune.training.memory import MemoryPlan, arranged
from kinprune.training.needs import Needs
from kinprune.training.planning import plan_memory
from kinprune.training.recomputation import blocks, recomputed
from kinprune.training.resident import _watch_kernel, _watch_looking
from kinprune.training.step import Lesson, learn, learn_part

PREPROCESSING = Preprocessing(image_size=(32, 32))
EXACT = Recipe(steps=3, batch_size=32, precision="float32", evaluations=1)
ROOMY = 10**10


def noise(count: int, classes: int = 3, size: int = 32) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) % classes)


def model_of(name: str, size: int = 32, **options: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if "vit" in name:
            options["img_size"] = size
        return timm.create_model(name, num_classes=3, **options)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def needs_of(
    model: nn.Module, recipe: Recipe, split: Split, moments: int = 1, teacher: nn.Module | None = None
) -> Needs:
    lesson = Lesson(model, teacher, PREPROCESSING, recipe, "float32")
    return Needs(lesson, split.images, min(recipe.batch_size, len(split.labels)), moments)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


# the same lessons


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_limit_with_room_changes_nothing(name: str) -> None:
    free, limited = model_of(name), model_of(name)
    first = fine_tune(free, noise(48), PREPROCESSING, EXACT, teacher=model_of(name))
    second = fine_tune(limited, noise(48), PREPROCESSING, EXACT, teacher=model_of(name), memory_limit=ROOMY)
    assert first.losses == second.losses and same(state_of(free), state_of(limited))
    assert first.memory is None and second.memory is not None
    assert (second.memory.micro_batch, second.memory.batch_size, second.memory.frozen) == (32, 32, ())


def test_parts_learn_what_the_whole_mini_batch_does() -> None:
    """A limit that only needs smaller parts: the same losses, up to rounding, teacher and smoothing too."""
    recipe, split = replace(EXACT, label_smoothing=0.1, learning_rate=1e-3), noise(44)
    free, limited = model_of("test_vit"), model_of("test_vit")
    first = fine_tune(free, split, PREPROCESSING, recipe, teacher=model_of("test_resnet"))
    needs = needs_of(limited, recipe, split, moments=2, teacher=model_of("test_resnet").eval())
    limit = needs.predict(MemoryPlan(32, parts=4, compact=True, taught_at_once=1, judged_at_once=1))
    second = fine_tune(limited, split, PREPROCESSING, recipe, teacher=model_of("test_resnet"), memory_limit=limit)
    assert second.memory is not None
    assert second.memory.micro_batch < 32 and second.memory.recomputed == 0 and second.memory.frozen == ()
    assert second.losses == pytest.approx(first.losses, rel=1e-5) and first.losses != second.losses


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_gradients_of_parts_add_up_to_those_of_the_whole(parts: int) -> None:
    model, split = model_of("test_vit"), noise(8)
    lesson, target = Lesson(model, None, PREPROCESSING, EXACT, "float32"), torch.randn(8, 3)
    found = []
    for number in (1, parts):
        model.zero_grad()
        loss = learn(lesson, split.images, split.labels, target, number)
        found.append((float(loss), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_recomputation_gives_the_same_gradients_and_counts_statistics_once(name: str) -> None:
    options = {"drop_path_rate": 0.3} if name != "test_resnet" else {}
    found = []
    for again in (False, True):
        model = model_of(name, **options).train()
        names = blocks(model) if again else []
        assert not again or len(names) >= 2
        torch.manual_seed(1)
        with recomputed(model, names):
            lesson = Lesson(model, None, PREPROCESSING, EXACT, "float32")
            learn_part(lesson, noise(8).images, noise(8).labels, None, 1)
        assert all("forward" not in vars(module) for module in model.modules())
        found.append((gradients(model), state_of(model)))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert same(found[0][1], found[1][1])
    if batch_norms(model):
        assert {int(norm.num_batches_tracked) for norm in batch_norms(model)} == {1}


def test_blocks_that_keep_a_state_are_not_recomputed() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.register_buffer("passes", torch.zeros(1))

        def forward(self, images: Tensor) -> Tensor:
            self.passes += 1
            return self.second(self.first(images)) * self.passes

    model = nn.Sequential(nn.Sequential(Counting(), Counting()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    assert blocks(model) == ["0.0", "0.1"]
    assert needs_of(model, EXACT, noise(8)).blocks == ()
    assert float(model[0][0].passes) == 0, "the trial is undone"
    vit = model_of("test_vit")
    assert needs_of(vit, EXACT, noise(8)).blocks == tuple(blocks(vit)) != ()


# what is counted


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("again", [False, True])
def test_shapes_alone_foretell_the_tensors_of_a_pass(name: str, again: bool) -> None:
    model, split = model_of(name), noise(8)
    needs = needs_of(model, EXACT, split)
    plan = MemoryPlan(8, recomputed=needs.blocks if again else ())
    foretold = needs.pass_of("learn", plan, 8)
    assert all(parameter.grad is None for parameter in model.parameters())
    with arranged(plan, model, ()), needs.normed(model, plan):
        learn_part(needs.lesson, split.images, split.labels, None, 1)
        counted = live_peak(lambda: learn_part(needs.lesson, split.images, split.labels, None, 1))
    assert foretold == counted > 0


def test_what_is_alive_is_counted_once_and_only_while_it_is() -> None:
    def compute() -> None:
        first = torch.zeros(1000)
        view = first.view(10, 100)
        view.add_(1)
        second = view + 1
        del first, view
        third = second * 2
        del second
        torch.zeros(500) + third.view(-1)[:500]

    assert live_peak(compute) == 4 * 2000


def test_recomputing_and_freezing_take_less() -> None:
    needs = needs_of(model_of("test_vit"), EXACT, noise(32), moments=2)
    plain = MemoryPlan(32, compact=True, taught_at_once=32)
    names = tuple(layer.name for layer in needs.layers)
    sizes = [needs.predict(plain), needs.predict(replace(plain, recomputed=needs.blocks))]
    sizes += [needs.predict(replace(plain, frozen=names[:count])) for count in range(1, len(names))]
    assert sizes[1] < sizes[0] and sizes[2:] == sorted(sizes[2:], reverse=True) and sizes[2] <= sizes[0]
    assert needs.predict(replace(plain, parts=8)) < sizes[0]


def test_pieces_are_in_the_order_images_pass_them() -> None:
    model = model_of("test_vit")
    found = [piece.name for piece in pieces(model, torch.zeros(1, 3, 32, 32), blocks(model))]
    assert found[0].startswith("cls_token") and found[1] == "patch_embed.proj"
    assert found[2 : 2 + len(blocks(model))] == blocks(model) and found[-1] == "head"
    parameters = {name for piece in pieces(model, torch.zeros(1, 3, 32, 32), []) for name in piece.parameters}
    assert parameters == {name for name, _ in model.named_parameters()}


# the plan


def limits_of(needs: Needs) -> list[int]:
    roomy = needs.predict(MemoryPlan(needs.batch_size, taught_at_once=needs.batch_size))
    least = least_limit(needs.model, None, PREPROCESSING, needs.lesson.recipe)
    return [roomy - round((roomy - least) * share) for share in (0, 0.5, 0.8, 0.9, 0.95, 0.98, 1)]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_plans_keep_below_their_limits_and_do_no_more_than_they_must(name: str) -> None:
    recipe = Recipe(steps=3, batch_size=64, precision="float32")
    needs = needs_of(model_of(name), recipe, noise(64), moments=2 if name == "test_vit" else 1)
    plans = [plan_memory(needs, limit) for limit in limits_of(needs)]
    for plan in plans:
        assert plan.predicted is not None and plan.limit is not None and plan.predicted <= plan.limit
    assert plans[0].parts == 1 and not plans[0].compact and not plans[0].recomputed
    assert plans[-1].frozen and plans[-1].parts == 64
    counts = [len(plan.frozen) for plan in plans]
    assert counts == sorted(counts) and counts[1] == 0
    for plan in plans:
        assert not plan.frozen or plan.recomputed == needs.blocks
        if batch_norms(needs.model):
            assert plan.norms_frozen == (plan.least_part < 16)


def test_batch_norm_is_said_to_be_frozen_where_parts_are_small() -> None:
    recipe, split = Recipe(steps=4, batch_size=32, precision="float32", learning_rate=0.05), noise(40)
    model = model_of("test_resnet")
    needs = needs_of(model, recipe, split)
    before = state_of(model)
    plan = MemoryPlan(32, parts=4, compact=True, taught_at_once=1, judged_at_once=1, norms_frozen=True)
    limit = needs.predict(replace(plan, recomputed=needs.blocks))
    result = fine_tune(model, split, PREPROCESSING, recipe, memory_limit=limit)
    assert result.memory is not None and result.memory.norms_frozen and result.memory.micro_batch < 16
    means = [name for name in before if name.endswith("running_mean")]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in means)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_refusal_names_the_smallest_limit_and_that_one_works(name: str) -> None:
    recipe, split = replace(EXACT, learning_rate=1e-3), noise(40)
    model = model_of(name)
    before = state_of(model)
    with pytest.raises(
        TrainingError, match=r"is predicted to take ([\d,]+) bytes; expected a limit of at least"
    ) as told:
        fine_tune(model, split, PREPROCESSING, recipe, memory_limit=10**6)
    assert same(state_of(model), before) and not any(module.training for module in model.modules())
    least = int(str(told.value).partition("predicted to take ")[2].partition(" bytes")[0].replace(",", ""))
    assert least == least_limit(model, None, PREPROCESSING, recipe)
    with pytest.raises(TrainingError, match="expected a limit of at least"):
        fine_tune(model, split, PREPROCESSING, recipe, memory_limit=least - 1)
    result = fine_tune(model, split, PREPROCESSING, recipe, memory_limit=least)
    assert result.memory is not None and result.memory.predicted == least and len(result.losses) == 3
    assert result.memory.frozen and result.memory.micro_batch == 1
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= {f"{model.default_cfg['classifier']}.{part}" for part in ("weight", "bias")}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_same_seed_and_limit_give_the_same_model() -> None:
    recipe, split = replace(EXACT, learning_rate=1e-3, precision="bfloat16"), noise(40)
    models = [model_of("test_vit", proj_drop_rate=0.2) for _ in range(2)]
    limit = int(1.05 * least_limit(models[0], None, PREPROCESSING, recipe))
    found = []
    for model, seed in zip(models, (1, 2), strict=True):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(fine_tune(model, split, PREPROCESSING, recipe, memory_limit=limit))
        assert torch.equal(torch.get_rng_state(), before)
    assert same(state_of(models[0]), state_of(models[1])) and found[0].losses == found[1].losses


def test_interrupted_under_a_limit_the_best_state_is_left() -> None:
    recipe, split = Recipe(steps=8, batch_size=16, precision="float32", learning_rate=1e-3, evaluations=8), noise(40)
    model = model_of("test_vit")
    limit = int(1.02 * least_limit(model, None, PREPROCESSING, recipe))
    states: dict[int, dict[str, Tensor]] = {0: state_of(model)}

    def interrupt(step: int, steps: int, loss: float) -> None:
        states[step] = state_of(model)
        if step == 5:
            raise KeyboardInterrupt

    result: TrainingResult = fine_tune(model, split, PREPROCESSING, recipe, memory_limit=limit, on_step=interrupt)
    assert result.stopped and len(result.losses) == 5 and result.memory is not None and result.memory.frozen
    assert same(state_of(model), states[result.best_step])
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(TrainingError, match="limit of memory is 0; expected"):
        fine_tune(model_of("test_vit"), noise(8), PREPROCESSING, EXACT, memory_limit=0)
    still = fine_tune(model_of("test_vit"), noise(8), PREPROCESSING, replace(EXACT, steps=0), memory_limit=1)
    assert still.memory is None, "no step takes no memory"


def test_a_model_that_does_not_run_by_shapes_alone_is_refused() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, images: Tensor) -> Tensor:
            answers = self.layer(images.mean((2, 3)))
            return answers if float(answers.sum()) > 0 else 2 * answers

    with pytest.raises(TrainingError, match=r"cannot be foretold.*leave out the limit"):
        fine_tune(Choosing(), noise(8), PREPROCESSING, EXACT, memory_limit=ROOMY)


# what is measured

MEASURED = """
import json, sys
import timm, torch
from kinprune.preprocessing import Preprocessing
from kinprune.tasks import Split
from kinprune.training import Recipe, fine_tune
torch.manual_seed(0)
name, megabytes, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = {"img_size": size} if "vit" in name else {}
model, teacher = (timm.create_model(name, num_classes=3, **options) for _ in range(2))
split = Split(torch.randint(0, 256, (80, 3, size, size), dtype=torch.uint8), torch.arange(80) % 3)
recipe = Recipe(steps=4, batch_size=64, evaluations=2)
preprocessing = Preprocessing(image_size=(size, size))
for limit in (megabytes * 10**6, 10**10):
    memory = fine_tune(model, split, preprocessing, recipe, teacher=teacher, memory_limit=limit).memory
    print(json.dumps([memory.peak, memory.predicted, memory.micro_batch]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc, which is Linux's")
@pytest.mark.parametrize(("name", "megabytes"), [("test_vit", 45), ("test_resnet", 60)])
def test_limits_hold_as_measured_in_a_process_of_its_own(name: str, megabytes: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(kp.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED, name, str(megabytes), "96"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    tight, roomy = map(json.loads, done.stdout.splitlines())
    assert 0 < tight[0] <= tight[1] <= megabytes * 10**6 < roomy[0] <= roomy[1], "without need it takes more"
    assert tight[2] < roomy[2] == 64


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc, which is Linux's")
@pytest.mark.parametrize("how", [_watch_kernel, _watch_looking])
def test_a_watch_sees_what_came_and_went(how: object) -> None:
    stop = how()  # type: ignore[operator]
    if stop is None:
        pytest.skip("this system does not set its peak back")
    # A mapping of its own: memory that the process has kept from other tests might serve a tensor.
    block = mmap.mmap(-1, 10**8)
    block.write(b"1" * 10**8)
    time.sleep(1)  # a busy machine may let a watch that looks wait
    block.close()
    assert 80 * 10**6 < stop() < 300 * 10**6


HOLES = """
import re
from contextlib import nullcontext
from pathlib import Path
import torch
from kinprune.training.resident import give_back_unused, returned_at_once

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.ones(7 * 10**6)  # from now on, blocks smaller than this are in the heap
rows = [torch.ones(250_000) for _ in range(160)]
del rows[::2]
for way in (nullcontext, returned_at_once, nullcontext):
    give_back_unused()
    with way():
        before = resident()
        taken = [torch.ones(240_000) for _ in range(50)]
        assert resident() - before > 40 * 10**6
        del taken
        print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps blocks in this way")
def test_blocks_go_back_at_once_where_the_heap_has_holes_too() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(kp.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True, env=environment)
    usual, at_once, after = map(int, done.stdout.split())
    assert at_once < 3 * 10**6 and min(usual, after) > 20 * 10**6
