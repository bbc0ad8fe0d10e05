from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from kinprune.errors import UnitError
from kinprune.inheritance import Donor, inherit
from kinprune.units import Mask, UnitSpace, extract, find_units
from kinprune.units.layout import unit_of


class Two(nn.Module):
    """Hidden layers of 4 and 3 nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, bias=False)
        self.second = nn.Linear(4, 3, bias=False)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.flatten(1)).relu()).relu())


class Depthwise(nn.Module):
    """A residual block with a depthwise layer between two pointwise ones, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        expand = [nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
        deep = [nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU()]
        self.block = nn.Sequential(*expand, *deep, nn.Conv2d(12, 6, 1))
        self.head = nn.Linear(6, 5)
        self.register_buffer("made", torch.arange(12.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        return self.head((x + self.block(x)).mean((2, 3)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Tied(nn.Module):
    """An MLP with two names, and a third that shares its weights but not its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 6)
        self.one = Mlp()
        self.two = self.one
        self.three = Mlp()
        self.three.up.weight, self.three.down.weight = self.one.up.weight, self.one.down.weight
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        x = x + self.one(x)
        x = x + self.two(x)
        return self.head(x + self.three(x))


MODELS: dict[str, tuple[Any, int, bool]] = {
    "two": (Two, 1, False),
    "depthwise": (Depthwise, 8, False),
    "depthwise-stream": (Depthwise, 8, True),
    "tied": (Tied, 2, False),
    "vit": (
        partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3),
        32,
        False,
    ),
    "vit-stream": (
        partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=3),
        32,
        True,
    ),
    "densenet": (partial(timm.create_model, "densenet121", block_config=(2, 2), growth_rate=4), 32, False),
}


def named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def scatter(model: nn.Module, seed: int) -> nn.Module:
    """Other numbers everywhere, as after a training of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in named(model).values()}.values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator).abs() + 0.1)
    return model


def built(name: str) -> tuple[nn.Module, UnitSpace]:
    make, size, stream = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = scatter(make().eval(), 1)
    head = "classifier" if name == "densenet" else "head"
    return model, find_units(model, (size, size), stream=stream, head=head)


def draw(space: UnitSpace, seed: int) -> Mask:
    random = np.random.default_rng(seed)
    kept = np.zeros(len(space), dtype=bool)
    for part in space.split(kept):
        part[random.choice(len(part), int(random.integers(1, len(part) + 1)), replace=False)] = True
    return Mask(kept, space.fingerprint)


def donor_of(model: nn.Module, space: UnitSpace, mask: Mask, weight: float, seed: int) -> Donor:
    """A neighbour: cut by the mask, then trained elsewhere; it brings no classifier."""
    small = scatter(extract(model, space, mask), seed)
    tensors = {name: tensor for name, tensor in small.state_dict().items() if not name.startswith(f"{space.head}.")}
    return Donor(mask, tensors, weight)


def membership(space: UnitSpace, name: str, shape: torch.Size, mask: Mask) -> list[np.ndarray]:
    """For each dimension of the whole tensor which indices the mask keeps, without the code under test."""
    found = []
    layouts = space.tensors.get(name, ())
    for dimension, length in enumerate(shape):
        keeps = np.ones(length, dtype=bool)
        for number, part in enumerate(space.split(mask.kept)) if layouts else ():
            units = unit_of(layouts[dimension], number, space.sizes.tolist())
            keeps &= (units < 0) | part[units]
        found.append(keeps)
    return found


def slow(model: nn.Module, space: UnitSpace, mask: Mask, donors: list[Donor]) -> dict[str, Tensor]:
    """Entry by entry in double precision: every donor's numbers at their places in the whole tensor, then the cut."""
    result = {}
    first: dict[int, str] = {}
    for alias, tensor in named(model).items():
        name = first.setdefault(id(tensor), alias)
        keeps = membership(space, name, tensor.shape, mask)
        whole = tensor.detach().clone()
        inherited = tensor.is_floating_point() and name in model.state_dict() and not name.startswith(f"{space.head}.")
        if inherited:
            has = [membership(space, name, tensor.shape, donor.mask) for donor in donors]
            places = [[np.cumsum(keep) - 1 for keep in present] for present in has]
            for index in itertools.product(*(np.flatnonzero(keep) for keep in keeps)):
                total = weight = 0.0
                for donor, place, present in zip(donors, places, has, strict=True):
                    if all(present[d][i] for d, i in enumerate(index)):
                        at = tuple(int(place[d][i]) for d, i in enumerate(index))
                        total += donor.weight * float(donor.tensors[name][at])
                        weight += donor.weight
                if weight:
                    whole[index] = total / weight
        for dimension, keep in enumerate(keeps):
            whole = whole.index_select(dimension, torch.from_numpy(np.flatnonzero(keep)))
        result[alias] = whole
    return result


def same(found: nn.Module, expected: Mapping[str, Tensor]) -> None:
    tensors = named(found)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


# --- by hand


def test_averages_by_hand() -> None:
    model, space = built("two")
    with torch.no_grad():
        model.first.weight.copy_(torch.arange(12.0).view(4, 3))
        model.second.weight.copy_(torch.arange(12.0).view(3, 4) * 100)
    mask = Mask(np.array([True, True, True, False, True, False, True]), space.fingerprint)
    near = Donor(
        Mask(np.array([True, True, False, False, True, True, False]), space.fingerprint),
        {"first.weight": torch.full((2, 3), 1.0), "second.weight": torch.tensor([[10.0, 20], [30, 40]])},
        3.0,
    )
    far = Donor(
        Mask(np.array([False, True, False, True, True, False, True]), space.fingerprint),
        {"first.weight": torch.full((2, 3), 5.0), "second.weight": torch.tensor([[60.0, 70], [80, 90]])},
        1.0,
    )
    small = inherit(model, space, mask, [far, near])
    # Node 0 is the near one's, node 1 is in both, node 2 is the backbone's.
    assert small.first.weight.tolist() == [[1, 1, 1], [2, 2, 2], [6, 7, 8]]
    # Filter 0 is in both: from node 0 the near one's 10, from node 1 (3 * 20 + 60) / 4; filter 2 only in the far one.
    assert small.second.weight.tolist() == [[10, 30, 200], [800, 80, 1000]]
    nearest = inherit(model, space, mask, [far, near], average=False)
    assert nearest.first.weight.tolist() == [[1, 1, 1], [1, 1, 1], [6, 7, 8]]
    assert nearest.second.weight.tolist() == [[10, 20, 200], [800, 900, 1000]]
    assert torch.equal(small.head.weight, model.head.weight[:, [0, 2]])


# --- against the slow reference


@pytest.mark.parametrize("name", MODELS)
def test_every_entry_is_that_of_the_slow_reference(name: str) -> None:
    model, space = built(name)
    donors = [donor_of(model, space, draw(space, seed), 0.3 + seed, seed) for seed in (3, 4, 5)]
    mask = draw(space, 6)
    small = inherit(model, space, mask, donors)
    expected = slow(model, space, mask, donors)
    for key, tensor in named(small).items():
        assert tensor.dtype == expected[key].dtype
        assert torch.allclose(tensor, expected[key], rtol=1e-6, atol=0), key
    nearest = inherit(model, space, mask, donors, average=False)
    same(nearest, slow(model, space, mask, donors[2:]))


@pytest.mark.parametrize("name", MODELS)
def test_a_donor_of_the_same_mask_gives_exactly_its_own_model(name: str) -> None:
    model, space = built(name)
    mask = draw(space, 7)
    donor = donor_of(model, space, mask, 0.7, 8)
    small = inherit(model, space, mask, [donor])
    alone = named(extract(model, space, mask))
    for key, tensor in named(small).items():
        assert torch.equal(tensor, donor.tensors.get(key, alone[key])), key


@pytest.mark.parametrize("name", MODELS)
def test_donors_cut_from_the_backbone_give_exactly_the_extracted_model(name: str) -> None:
    model, space = built(name)
    donors = []
    for seed in range(5):
        mask = draw(space, seed)
        donors.append(Donor(mask, extract(model, space, mask).state_dict(), 0.1 + seed / 7))
    mask = draw(space, 9)
    same(inherit(model, space, mask, donors), named(extract(model, space, mask)))


def test_of_a_donor_with_none_of_the_units_only_what_nothing_cuts_is_taken() -> None:
    model, space = built("depthwise")
    kept = np.arange(len(space)) % 2 == 0
    donor = donor_of(model, space, Mask(~kept, space.fingerprint), 1.0, 2)
    small = named(inherit(model, space, Mask(kept, space.fingerprint), [donor]))
    alone = named(extract(model, space, Mask(kept, space.fingerprint)))
    for name, tensor in small.items():
        cut = name in {part.tensor for group in space.groups for part in group.parts}
        taken = name in donor.tensors and not cut
        assert torch.equal(tensor, donor.tensors[name] if taken else alone[name]), name
    assert torch.equal(small["stem.weight"], donor.tensors["stem.weight"])
    assert not torch.equal(alone["stem.weight"], small["stem.weight"])


@pytest.mark.parametrize("average", [True, False])
def test_the_order_of_donors_changes_no_bit(average: bool) -> None:
    model, space = built("depthwise")
    masks = [draw(space, seed) for seed in (1, 1, 2, 2, 3)]  # equal masks with equal weights are told apart by content
    donors = [donor_of(model, space, mask, 1 / 3, seed) for seed, mask in enumerate(masks)]
    expected = named(inherit(model, space, draw(space, 4), donors, average=average))
    for order in itertools.islice(itertools.permutations(donors), 1, 120, 17):
        same(inherit(model, space, draw(space, 4), list(order), average=average), expected)


# --- types, names, what stays


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_donors_may_be_of_any_floating_type_and_the_backbones_is_kept(dtype: torch.dtype) -> None:
    model, space = built("vit")
    mask = draw(space, 3)
    donor = donor_of(model, space, mask, 2.0, 3)
    other = Donor(mask, {name: tensor.to(dtype) for name, tensor in donor.tensors.items()}, 2.0)
    small = named(inherit(model, space, mask, [other]))
    for name, tensor in other.tensors.items():
        assert small[name].dtype == torch.float32
        assert torch.equal(small[name], tensor.float())
    both = named(inherit(model, space, mask, [other, Donor(mask, donor.tensors, 6.0)]))
    mean = (0.25 * other.tensors["norm.weight"].double() + 0.75 * donor.tensors["norm.weight"].double()).float()
    assert torch.allclose(both["norm.weight"], mean, rtol=3e-7, atol=0)


def test_a_half_precision_backbone_stays_one() -> None:
    model, space = built("depthwise")
    donor = donor_of(model, space, draw(space, 3), 1.0, 3)
    small = inherit(model.half(), space, draw(space, 3), [donor])
    assert {tensor.dtype for tensor in small.parameters()} == {torch.float16}
    assert torch.equal(small.stem.weight, donor.tensors["stem.weight"].half())


def test_tied_tensors_stay_tied_and_any_of_their_names_will_do() -> None:
    model, space = built("tied")
    mask = draw(space, 3)
    donor = donor_of(model, space, mask, 1.0, 3)
    weights = {name for name in donor.tensors if name.endswith(("up.weight", "down.weight"))}
    assert {name.partition(".")[0] for name in weights} == {"one", "two", "three"}
    for given in ("one", "two", "three"):
        tensors = {k: v for k, v in donor.tensors.items() if k not in weights or k.startswith(given)}
        small = inherit(model, space, mask, [Donor(mask, tensors, 1.0)])
        assert small.two is small.one and small.three.down.weight is small.one.down.weight
        assert torch.equal(small.one.down.weight, donor.tensors["one.down.weight"])
        assert torch.equal(small.three.up.weight, donor.tensors["one.up.weight"])
        assert torch.equal(small.three.up.bias, donor.tensors["three.up.bias"])
    apart = {**donor.tensors, "two.down.weight": donor.tensors["two.down.weight"] + 1}
    with pytest.raises(
        UnitError, match=r"one\.down\.weight and two\.down\.weight and .* are one tensor .* differ in donor 0"
    ):
        inherit(model, space, mask, [Donor(mask, apart, 1.0)])


def test_a_tensor_that_the_classifier_shares_is_the_classifiers() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[5].weight = model[4].weight
    space = find_units(model, (2, 2), head="5")
    mask = space.whole_mask()
    tensors = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    for name in ("4.weight", "5.weight", "5.bias"):
        del tensors[name]
    small = inherit(model, space, mask, [Donor(mask, tensors, 1.0)])
    assert small[4].weight is small[5].weight and torch.equal(small[4].weight, model[4].weight)
    assert torch.equal(small[5].bias, model[5].bias)
    assert all((small[place].weight == 1).all() for place in (1, 3)) and (small[4].bias == 1).all()


def test_counts_of_batches_the_classifier_and_what_the_code_makes_are_the_backbones() -> None:
    model, space = built("depthwise")
    model.stem_norm.num_batches_tracked.fill_(5)
    mask = draw(space, 3)
    donor = donor_of(model, space, mask, 1.0, 3)
    more = {
        "head.weight": torch.full((9, 9), torch.nan),
        "stem_norm.num_batches_tracked": torch.tensor(99),
        "made": torch.zeros(12),
        "unknown": torch.ones(1),
    }
    small = inherit(model, space, mask, [Donor(mask, {**donor.tensors, **more}, 1.0)])
    assert small.stem_norm.num_batches_tracked == 5
    assert torch.equal(small.head.weight, model.head.weight)
    assert torch.equal(small.made, model.made) and model.made.any()


def test_neither_backbone_nor_donors_change_or_share_memory_with_the_result() -> None:
    model, space = built("depthwise")
    mask = space.whole_mask()
    donor = donor_of(model, space, mask, 1.0, 3)
    before = [tensor.clone() for tensor in (*named(model).values(), *donor.tensors.values())]
    small = inherit(model, space, mask, [donor])
    with torch.no_grad():
        for tensor in named(small).values():
            tensor.zero_()
    after = [*named(model).values(), *donor.tensors.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in small.parameters())


def test_weights_of_any_size_and_ratio_work() -> None:
    model, space = built("two")
    mask = space.whole_mask()
    large, small = (donor_of(model, space, mask, weight, int(weight > 1)) for weight in (1e300, 1e-300))
    found = named(inherit(model, space, mask, [small, large]))
    assert torch.equal(found["first.weight"], large.tensors["first.weight"])
    part = Mask(np.array([True, False, False, False, True, False, False]), space.fingerprint)
    large = donor_of(model, space, part, 1e300, 3)
    found = named(inherit(model, space, mask, [small, large]))
    assert torch.equal(found["first.weight"][1:], small.tensors["first.weight"][1:])


# --- refusals


def test_bad_donors_are_refused_before_any_work() -> None:
    model, space = built("depthwise")
    mask = draw(space, 3)
    good = donor_of(model, space, mask, 1.0, 3)
    tensors = dict(good.tensors)
    counts = space.counts(mask.kept).tolist()

    def changed(**change: Tensor) -> Donor:
        return Donor(mask, {**tensors, **{name.replace("__", "."): value for name, value in change.items()}}, 1.0)

    nan = tensors["stem.weight"].clone()
    nan[0, 0, 0, 0] = torch.nan
    cases: list[tuple[list[Donor], str]] = [
        ([], "no donor, expected at least one"),
        ([good, Donor(Mask(mask.kept, "elsewhere"), tensors, 1.0)], "donor 1 does not fit: .*another unit space"),
        ([Donor(Mask(mask.kept & False, space.fingerprint), tensors, 1.0)], "donor 0 does not fit: .*keeps no unit"),
        (
            [changed(block__0__weight=torch.ones(1, 1))],
            r"block.0.weight of donor 0 has the shape \[1, 1\], expected \[",
        ),
        (
            [good, changed(block__3__weight=torch.ones(99, 1, 3, 3))],
            rf"block.3.weight of donor 1 has the shape \[99, 1, 3, 3\], expected \[{counts[0]}, 1, 3, 3\] by its mask",
        ),
        ([changed(stem__weight=tensors["stem.weight"].long())], "stem.weight of donor 0 is of torch.int64"),
        ([changed(stem__weight=nan)], "stem.weight of donor 0 holds values that are not finite"),
        ([changed(stem_norm__running_var=torch.full((6,), torch.inf))], "running_var of donor 0 .* not finite"),
    ]
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        cases.append(([Donor(mask, tensors, weight)], "expected a finite number above 0"))
    for missing in ("block.6.bias", "block.4.running_mean"):
        without = {name: value for name, value in tensors.items() if name != missing}
        cases.append(([good, Donor(mask, without, 1.0)], f"donor 1 has no tensor {missing}"))
    for donors, told in cases:
        with pytest.raises(UnitError, match=told):
            inherit(model, space, mask, donors)
    with pytest.raises(UnitError, match="another unit space"):
        inherit(model, space, Mask(mask.kept, "elsewhere"), [good])


def test_large_finite_numbers_are_no_infinity() -> None:
    model, space = built("two")
    mask = space.whole_mask()
    tensors = {"first.weight": torch.full((4, 3), 1e308, dtype=torch.float64), "second.weight": torch.ones(3, 4)}
    small = inherit(model.double(), space, mask, [Donor(mask, tensors, 1.0)])
    assert torch.equal(small.first.weight, tensors["first.weight"])


@pytest.mark.parametrize("name", ["depthwise", "tied", "vit"])
def test_a_larger_model_that_is_quiet_answers_as_its_donor(name: str) -> None:
    model, space = built(name)
    model.double()
    large, small = draw(space, 8), draw(space, 9)
    small = Mask(small.kept & large.kept, space.fingerprint)
    for few, many in zip(space.split(small.kept), space.split(large.kept), strict=True):
        few[np.flatnonzero(many)[0]] = True
    assert small.kept.sum() < large.kept.sum()
    own = scatter(extract(model, space, small), 4)
    tensors = {name: tensor for name, tensor in own.state_dict().items() if not name.startswith("head.")}
    quiet, loud = (inherit(model, space, large, [Donor(small, tensors, 1.0)], quiet=quiet) for quiet in (True, False))
    for one in (quiet, loud):
        one.get_submodule("head").load_state_dict(own.get_submodule("head").state_dict())
    side = MODELS[name][1]
    images = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = own.eval()(images)
    torch.testing.assert_close(quiet.eval()(images), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(loud.eval()(images), expected, rtol=1e-3)
