"""Evaluation against counting by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import timm
import torch
from torch import nn

from kinprune.errors import TaskError
from kinprune.evaluation import eval_mode, evaluate, judge, predict
from kinprune.preprocessing import Preprocessing
from kinprune.tasks import Split

PREPROCESSING = Preprocessing(image_size=(32, 32))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Brightness(nn.Module):
    """Answers class 0 for a dark image and class 1 for a bright one; class 2 never."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mean = inputs.mean((1, 2, 3))
        return torch.stack([-mean, mean, torch.full_like(mean, -9.0)], dim=1)


def grey(*levels: int) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_counts_by_hand() -> None:
    split = Split(grey(0, 10, 250, 255, 0), torch.tensor([0, 0, 1, 0, 2]))
    result = evaluate(Brightness(), split, PREPROCESSING, batch_size=2)
    assert result.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert result.confusion.dtype == np.int64
    assert result.accuracy == pytest.approx(3 / 5)
    assert result.per_class == (pytest.approx(2 / 3), 1.0, 0.0)
    assert result.n == 5
    assert json.loads(json.dumps(result.to_json()))["confusion"] == result.confusion.tolist()


def test_loss_is_the_mean_negative_log_probability() -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    split = Split(noise(7), torch.tensor([0, 1, 2, 3, 0, 1, 2]))
    probabilities = predict(model, split.images, PREPROCESSING, batch_size=3)
    assert torch.allclose(probabilities.sum(1), torch.ones(7))
    by_hand = -probabilities[torch.arange(7), split.labels].log().mean()
    assert evaluate(model, split, PREPROCESSING).loss == pytest.approx(float(by_hand), rel=1e-5)


def test_a_class_without_images_has_no_accuracy() -> None:
    assert judge(torch.eye(3)[:2], torch.tensor([0, 1])).per_class == (1.0, 1.0, None)


def test_batches_do_not_change_the_answers() -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    images = noise(9)
    whole = predict(model, images, PREPROCESSING, batch_size=9)
    assert torch.allclose(predict(model, images, PREPROCESSING, batch_size=2), whole, atol=1e-6)


def test_modes_are_restored_also_after_an_error() -> None:
    model = timm.create_model("test_resnet", num_classes=2).train()
    model.fc.eval()
    before = [module.training for module in model.modules()]
    predict(model, noise(2), PREPROCESSING)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="on purpose"), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("on purpose")
    assert [module.training for module in model.modules()] == before


def test_refuses_labels_without_an_output_and_empty_splits() -> None:
    with pytest.raises(TaskError, match="labels run from 0 to 3 but the model answers 3 classes"):
        evaluate(Brightness(), Split(grey(0, 1), torch.tensor([0, 3])), PREPROCESSING)
    with pytest.raises(TaskError, match="no image"):
        predict(Brightness(), grey()[:0], PREPROCESSING)
    with pytest.raises(TaskError, match="batch_size is 0"):
        predict(Brightness(), grey(1), PREPROCESSING, batch_size=0)


@pytest.mark.parametrize(("images", "sizes"), [(1, [1]), (32, [32]), (33, [17, 16]), (70, [24, 23, 23])])
def test_images_pass_in_nearly_equal_batches(images: int, sizes: list[int]) -> None:
    seen: list[int] = []
    model = Brightness()
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    predict(model, grey(*range(images)), PREPROCESSING)
    assert seen == sizes
