"""The whole way with a bank: kin found, a vote or a score mask, weights inherited, models made; on the command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kinprune as kp
from kinprune.adapt_plan import AdaptPlan
from kinprune.adapted import adapted_record
from kinprune.bank import record_key
from kinprune.bank.backbone import load_bank_backbone
from kinprune.building import Source, build, sample_sources
from kinprune.calibration import head_inputs
from kinprune.errors import BankError, BudgetError, KinpruneError
from kinprune.importance import normalise
from kinprune.kin import Search, find_kin, rank_exactly, sources_of
from kinprune.transferability import Target, TransferabilityError, transferability
from kinprune.units import Mask, extract
from kinprune.voting import ballot_smsp
from kinprune.voting import score_mask as score_mask_of

SOURCE_CLASSES = ("ant", "bat", "cow", "dog", "eel")
TARGET_CLASSES = ("apple", "pear", "plum")
PLAN = kp.Plan(kp.Budget(keep=0.3), rounds=1, score_images=16, recipe=kp.Recipe(steps=1, batch_size=8))
QUICK = AdaptPlan(search=Search(count=3), recipe=kp.Recipe(steps=2, batch_size=8))


@dataclass(frozen=True, eq=False)
class World:
    """A bank of six tasks, a task it has not seen, and where both are."""

    address: Path
    bank: kp.Bank
    folder: Path
    task: kp.DecodedTask
    backbone: kp.Backbone
    space: kp.UnitSpace


@pytest.fixture(scope="module")
def world(make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("adaptation")
    known = make_folder(root / "known", SOURCE_CLASSES, 8, 36)
    folder = make_folder(root / "new", TARGET_CLASSES, 10, 36)
    backbone = kp.load_backbone("test_resnet", num_classes=3, random=True, image_size=32)
    space = kp.find_units(backbone.model, (32, 32), head=backbone.head)
    bank = kp.create_bank(root / "bank.db", backbone, space)
    build(bank, sample_sources([Source(str(known))], 6, 2), PLAN)
    task = kp.decode(kp.load_task(folder), backbone.preprocessing)
    return World(root / "bank.db", bank, folder, task, backbone, space)


def target_of(world: World) -> Target:
    train = world.task.train
    features = head_inputs(world.backbone.model, world.backbone.head, train.images, world.task.preprocessing)
    return Target(features.float().numpy(), train.labels.numpy(), 3)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["mvp", "smsp"])
@pytest.mark.parametrize("inheritance", ["average", "nearest", "backbone"])
def test_the_budget_is_met_by_the_model_itself(world: World, method: Any, inheritance: Any) -> None:
    plan = replace(QUICK, method=method, inheritance=inheritance)
    whole = world.space.cost(world.space.whole_mask()).parameters
    adapted = kp.adapt(world.task, world.bank, kp.Budget(parameters=whole * 2 // 3), plan)
    (sized,) = adapted.sizes
    costs = sized.selection.costs
    # The bank's backbone was counted with three classes, like the task.
    assert sum(parameter.numel() for parameter in sized.model.parameters()) == costs.parameters <= whole * 2 // 3
    assert kp.evaluate(sized.model, world.task.test, world.task.preprocessing).accuracy == sized.final.accuracy
    assert len(adapted.neighbours) == 3 and sum(adapted.weights) == pytest.approx(1)


def test_what_is_left_open_goes_the_way_that_answers_best(world: World) -> None:
    still = replace(QUICK, recipe=kp.Recipe(steps=0))
    budget = kp.Budget(keep=0.4)
    ways = [
        replace(still, inheritance="average", blend=0.0),
        replace(still, inheritance="backbone", blend=0.0),
        replace(still, inheritance="nearest", blend=0.0, search=Search(count=1)),
        replace(still, inheritance="backbone", blend=1.0),
    ]
    tried = [kp.adapt(world.task, world.bank, budget, way) for way in ways]
    judged = [adapted.sizes[0].closed_form.judged for adapted in tried]
    assert all(loss is not None for loss in judged) and len(set(judged)) == 4
    best = tried[int(np.argmin(np.array(judged, dtype=np.float64)))]
    auto = kp.adapt(world.task, world.bank, budget, replace(still, inheritance="auto", blend=None))
    assert (auto.voters, auto.blend) == (best.voters, best.blend)
    assert auto.sizes[0].inherited == best.sizes[0].inherited
    assert same(state_of(auto.sizes[0].model), state_of(best.sizes[0].model))


def test_the_broadest_neighbour_is_tried_alone_where_it_is_not_the_nearest(world: World, tmp_path: Path) -> None:
    bank = kp.create_bank(tmp_path / "bank.db", world.backbone, world.space)
    same_task, broad = Source(str(world.folder)), Source(str(world.folder.parent / "known"))
    build(bank, [same_task, broad], PLAN)
    still = replace(QUICK, recipe=kp.Recipe(steps=0))
    twin, wide = (entry.key for entry in sorted(bank.entries(), key=lambda entry: len(entry.classes)))
    starts = []
    for hidden in ((), (twin,)):
        tried: list[str] = []
        tell = partial(lambda stages, stage, *_: stages.append(stage), tried)
        adapted = kp.adapt(world.task, bank, kp.Budget(keep=0.3), still, without=hidden, on_step=tell)
        starts.append(tried.count("closed form"))
        assert (adapted.neighbours[0].entry.key == wide) == bool(hidden)
    assert starts == [5, 4]


def test_few_images_take_a_broad_neighbour_as_it_is(world: World, tmp_path: Path) -> None:
    """Two classes of eight images each: none can be spared to tell whether anything made of the others is good."""
    bank = kp.create_bank(tmp_path / "bank.db", world.backbone, world.space)
    source = Source(str(world.folder.parent / "known"))
    build(bank, [source, *sample_sources([source], 3, 2)], PLAN)
    (broad,) = (entry for entry in bank.entries() if len(entry.classes) == len(SOURCE_CLASSES))
    task = kp.decode(kp.load_task(world.folder, classes=TARGET_CLASSES[:2]), world.backbone.preprocessing)
    adapted = kp.adapt(
        task, bank, [kp.Budget(keep=0.3), kp.Budget(keep=0.6)], replace(QUICK, recipe=kp.Recipe(steps=0))
    )
    assert [adapted.neighbours[place].entry.key for place in adapted.voters] == [broad.key]
    taken, larger = adapted.sizes
    assert taken.inherited == "nearest" and not taken.closed_form.layers
    own, head = state_of(taken.model), f"{world.backbone.head}."
    stored = {name: tensor for name, tensor in bank.tensors(broad).items() if not name.startswith(head)}
    assert stored and all(torch.equal(own[name], tensor.to(own[name])) for name, tensor in stored.items())
    assert larger.closed_form.layers  # it has units that its neighbour never trained


def test_a_broad_neighbour_gives_way_to_what_is_surely_better_alone(
    world: World, tmp_path: Path, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = kp.create_bank(tmp_path / "bank.db", world.backbone, world.space)
    source = Source(str(world.folder.parent / "known"))
    build(bank, [source, *sample_sources([source], 3, 2)], PLAN)
    folder = make_folder(tmp_path / "many", TARGET_CLASSES[:2], 24, 36)
    task = kp.decode(kp.load_task(folder), world.backbone.preprocessing)
    chosen = []
    for sure in (0.0, 1e9):
        monkeypatch.setattr("kinprune.calibration.head.SURE", sure)
        adapted = kp.adapt(task, bank, kp.Budget(keep=0.3), replace(QUICK, recipe=kp.Recipe(steps=0)))
        chosen.append((adapted.sizes[0].closed_form.judged, [adapted.neighbours[one] for one in adapted.voters]))
    (free, _), (held, voters) = chosen
    assert [len(voter.entry.classes) for voter in voters] == [len(SOURCE_CLASSES)]
    assert free is not None and held is not None and free < held


def test_a_larger_model_takes_the_weights_that_suit_it(world: World) -> None:
    plan = replace(QUICK, inheritance="auto", blend=0.0, recipe=kp.Recipe(steps=0))
    for sized in kp.adapt(world.task, world.bank, [kp.Budget(keep=0.8), kp.Budget(keep=0.3)], plan).sizes:
        judged = {
            name: kp.adapt(world.task, world.bank, sized.budget, replace(plan, inheritance=name)).sizes[0].closed_form
            for name in ("average", "backbone")
        }
        assert sized.closed_form.judged == min(closed.judged or 0.0 for closed in judged.values())


def test_one_neighbour_gives_its_own_units_by_a_score_mask_too(world: World) -> None:
    plan = replace(QUICK, search=Search(count=1), blend=0, inheritance="nearest", recipe=kp.Recipe(steps=0))
    adapted = kp.adapt(world.task, world.bank, kp.Budget(keep=0.3), plan)
    kept = world.bank.lessons([adapted.neighbours[0].entry.id]).kept[0]
    assert adapted.voters == (0,) and np.array_equal(adapted.sizes[0].selection.mask.kept, kept)


@pytest.mark.parametrize("score_mask", ["kept", "soft"])
def test_a_score_mask_is_of_what_neighbours_kept_or_of_their_soft_scores(world: World, score_mask: Any) -> None:
    plan = replace(QUICK, score_mask=score_mask, inheritance="average", blend=0, recipe=kp.Recipe(steps=0))
    adapted = kp.adapt(world.task, world.bank, kp.Budget(keep=0.3), plan)
    lessons = world.bank.lessons([neighbour.entry.id for neighbour in adapted.neighbours])
    kept = lessons.kept if score_mask == "kept" else None
    ballot = ballot_smsp(world.space, kept, lessons.scores, np.array(adapted.weights))
    expected = kp.select(world.space, ballot.scores, kp.Budget(keep=0.3), ties=ballot.ties)
    assert adapted.sizes[0].selection.mask == expected.mask
    # What a bank would learn of it are soft scores either way: shares of neighbours say little of importance.
    soft = adapted_record(adapted, adapted.sizes[0], world.task).scores.astype(np.float64)
    means = normalise(world.space, score_mask_of(world.space, lessons.scores, np.array(adapted.weights)), "mean")
    assert np.allclose(soft, means, rtol=2e-3, atol=1e-6)


def test_a_family_nests_and_shares_one_score_mask(world: World) -> None:
    budgets = [kp.Budget(keep=keep) for keep in (0.2, 0.6, 0.4)]
    adapted = kp.adapt(world.task, world.bank, budgets, replace(QUICK, recipe=kp.Recipe(steps=0)))
    small, large, middle = (sized.selection.mask.kept for sized in adapted.sizes)
    assert np.all(small <= middle) and np.all(middle <= large) and small.sum() < middle.sum() < large.sum()
    assert all(sized.ballot is adapted.sizes[0].ballot for sized in adapted.sizes)
    assert all(sized.final.accuracy == sized.start.accuracy for sized in adapted.sizes)


def test_one_neighbour_that_votes_gives_its_own_mask(world: World) -> None:
    plan = replace(QUICK, method="mvp", search=Search(count=1), blend=0, recipe=kp.Recipe(steps=0))
    adapted = kp.adapt(world.task, world.bank, kp.Budget(keep=0.3), plan)
    kept = world.bank.lessons([adapted.neighbours[0].entry.id]).kept[0]
    assert np.array_equal(adapted.sizes[0].selection.mask.kept, kept)


def test_the_order_of_the_bank_does_not_matter_and_runs_repeat(world: World, tmp_path: Path) -> None:
    turned = kp.create_bank(tmp_path / "turned.db", world.backbone, world.space)
    for entry in reversed(world.bank.entries()):
        assert turned.add(world.bank.record(entry))
    for method in ("mvp", "smsp"):
        plan = replace(QUICK, method=method)
        first, again, other = (
            kp.adapt(world.task, bank, kp.Budget(keep=0.4), plan) for bank in (world.bank, world.bank, turned)
        )
        assert [neighbour.entry.key for neighbour in first.neighbours] == [n.entry.key for n in other.neighbours]
        assert first.weights == other.weights
        for second in (again, other):
            assert first.sizes[0].selection.mask == second.sizes[0].selection.mask
            assert same(state_of(first.sizes[0].model), state_of(second.sizes[0].model))


def test_kin_are_those_of_highest_transferability(world: World) -> None:
    target = target_of(world)
    (chunk,) = world.bank.probes()
    scores = transferability("leep", target, sources_of(chunk.probes))
    found = find_kin(world.bank, target, TARGET_CLASSES, Search(count=4))
    assert [neighbour.entry.id for neighbour in found] == chunk.ids[np.argsort(-scores)[:4]].tolist()
    assert [neighbour.similarity for neighbour in found] == pytest.approx(np.sort(scores)[::-1][:4].tolist())
    # Some records at a time must give the same.
    farthest = find_kin(world.bank, target, TARGET_CLASSES, Search(count=2, which="farthest"))
    everyone = find_kin(world.bank, target, TARGET_CLASSES, Search(which="all"))
    assert [n.entry.id for n in farthest] == [n.entry.id for n in everyone[-2:]] and len(everyone) == 6
    drawn = [find_kin(world.bank, target, (), Search(count=3, which="random", seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and len({n.entry.id for n in drawn[0]}) == 3
    without = find_kin(world.bank, target, (), Search(count=6), without={found[0].entry.key})
    assert len(without) == 5 and found[0].entry.key not in {n.entry.key for n in without}


def test_tasks_of_any_breadth_are_compared_alike(world: World, tmp_path: Path) -> None:
    bank = kp.create_bank(tmp_path / "mixed.db", world.backbone, world.space)
    build(bank, [Source(str(world.address.parent / "known"))], PLAN)  # five classes, and then tasks of two
    for entry in world.bank.entries():
        assert bank.add(world.bank.record(entry))
    target = target_of(world)
    found = find_kin(bank, target, TARGET_CLASSES, Search(which="all"))
    assert {len(neighbour.entry.classes) for neighbour in found} == {2, 5} and len(found) == 7
    for neighbour in found:
        alone = transferability("leep", target, sources_of([bank.record(neighbour.entry).probe]))
        assert neighbour.similarity == pytest.approx(float(alone[0]), rel=1e-6)
    nearest = find_kin(bank, target, TARGET_CLASSES, Search(count=3))
    assert [n.entry.key for n in nearest] == [n.entry.key for n in found[:3]]


def test_shared_classes_are_named(world: World) -> None:
    entry = world.bank.entries()[0]
    found = find_kin(world.bank, target_of(world), ("zebra", entry.classes[1]), Search(which="all"))
    assert {n.entry.id: n.shared for n in found}[entry.id] == (entry.classes[1],)


def test_exact_kin_are_ranked_by_their_own_models(world: World) -> None:
    target = target_of(world)
    search = Search(count=2, exact=4)
    found = find_kin(world.bank, target, (), search)
    assert len(found) == 4
    ranked = rank_exactly(found, world.bank, world.backbone, world.space, world.task.train.images, target, search)
    expected = {}
    for neighbour in found:
        record = world.bank.record(neighbour.entry)
        two = load_bank_backbone(world.bank, 2)
        model = extract(two.model, world.space, Mask(record.mask.kept, world.space.fingerprint))
        model.load_state_dict(record.tensors)
        theta = kp.predict(model, world.task.train.images, world.task.preprocessing).double().numpy()
        expected[neighbour.entry.id] = slow_leep(theta, target.labels)
    best = sorted(expected, key=lambda number: -expected[number])[:2]
    assert [neighbour.entry.id for neighbour in ranked] == best
    assert [neighbour.similarity for neighbour in ranked] == pytest.approx([expected[n] for n in best], abs=1e-4)


def slow_leep(theta: Any, labels: Any) -> float:
    """LEEP as it is printed (Nguyen et al. 2020), an image and a class at a time."""
    n, classes = theta.shape
    joint = {(y, z): 0.0 for y in set(labels.tolist()) for z in range(classes)}
    for row, label in zip(theta, labels.tolist(), strict=True):
        for z in range(classes):
            joint[label, z] += row[z] / n
    marginal = [sum(joint[y, z] for y in set(labels.tolist())) for z in range(classes)]
    logs = [
        np.log(sum(joint[label, z] / marginal[z] * row[z] for z in range(classes)))
        for row, label in zip(theta, labels.tolist(), strict=True)
    ]
    return float(np.mean(logs))


def test_the_targets_own_importance_can_decide_alone(world: World) -> None:
    plan = replace(QUICK, blend=1.0, criterion="l1", recipe=kp.Recipe(steps=0))
    adapted = kp.adapt(world.task, world.bank, kp.Budget(keep=0.5), plan)
    alone = kp.select(world.space, kp.score("l1", world.backbone.model, world.space), kp.Budget(keep=0.5))
    assert np.array_equal(adapted.sizes[0].selection.mask.kept, alone.mask.kept)


def test_bad_input_is_refused_before_any_work(world: World, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="cannot be reached"):
        kp.adapt(world.task, world.bank, kp.Budget(parameters=10), QUICK)
    with pytest.raises(BudgetError, match="no budget"):
        kp.adapt(world.task, world.bank, [], QUICK)
    empty = kp.create_bank(tmp_path / "empty.db", world.backbone, world.space)
    with pytest.raises(BankError, match="no record"):
        kp.adapt(world.task, empty, kp.Budget(keep=0.5), QUICK)
    other = replace(world.task, preprocessing=replace(world.task.preprocessing, crop_pct=0.5))
    with pytest.raises(BankError, match="preprocessing"):
        kp.adapt(other, world.bank, kp.Budget(keep=0.5), QUICK)
    with pytest.raises(TransferabilityError, match="no measure 'guess'"):
        kp.adapt(world.task, world.bank, kp.Budget(keep=0.5), replace(QUICK, search=Search(measure="guess")))
    two = load_bank_backbone(world.bank, 2)
    with pytest.raises(BankError, match="num_classes=3"):
        kp.adapt(world.task, world.bank, kp.Budget(keep=0.5), QUICK, backbone=two)
    changes: list[dict[str, Any]] = [{"method": "coin"}, {"inheritance": "uncle"}, {"blend": 2}, {"multiple": 0}]
    for change in changes:
        with pytest.raises(KinpruneError):
            replace(QUICK, **change)


def run(kinprune: Callable[..., Any], command: str, world: World, out: Path | None = None) -> Any:
    places = {"NEW": world.folder, "BANK": world.address, "OUT": out}
    return kinprune(*(str(places.get(word, word)) for word in shlex.split(command)))


def test_kin_on_the_command_line(kinprune: Callable[..., Any], world: World) -> None:
    result = run(kinprune, "kin NEW --bank BANK --neighbours 3 --json", world)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    expected = find_kin(world.bank, target_of(world), TARGET_CLASSES, Search(count=3))
    assert [row["id"] for row in found["neighbours"]] == [neighbour.entry.id for neighbour in expected]
    shown = run(kinprune, "kin NEW --bank BANK --neighbours all --exact 2", world)
    assert shown.exit_code == 0 and "leep" in shown.stdout


def test_adapt_on_the_command_line(kinprune: Callable[..., Any], world: World, tmp_path: Path) -> None:
    command = "adapt NEW --bank BANK --sizes 0.6,0.3 --neighbours 3 --steps 1 --batch-size 8 --out OUT"
    result = run(kinprune, f"{command} --json", world, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert [size["budget"] for size in summary["sizes"]] == [{"keep": 0.6}, {"keep": 0.3}]
    assert len(summary["neighbours"]) == 3
    for folder, size in zip(summary["out"], summary["sizes"], strict=True):
        artifact = kp.load(folder)
        judged = kp.evaluate(artifact.model, world.task.test, artifact.preprocessing)
        assert artifact.classes == TARGET_CLASSES and judged.accuracy == size["accuracy"]
        assert size["params"] == sum(parameter.numel() for parameter in artifact.model.parameters())
        assert [row["id"] for row in artifact.provenance["neighbours"]] == [row["id"] for row in summary["neighbours"]]
    again = run(kinprune, command, world, tmp_path / "out")
    assert again.exit_code == 2 and "already holds an artifact" in again.stderr
    table = run(kinprune, "adapt NEW --bank BANK --keep 30% --steps 0 --no-onnx --out OUT", world, tmp_path / "one")
    assert table.exit_code == 0 and "whole model" in table.stdout and (tmp_path / "one" / "kinprune.json").is_file()


def test_adapt_in_little_memory_on_the_command_line(kinprune: Callable[..., Any], world: World, tmp_path: Path) -> None:
    command = "adapt NEW --bank BANK --keep 0.5 --neighbours 2 --steps 1 --batch-size 16 --no-onnx --out OUT"
    free = json.loads(run(kinprune, f"{command} --json", world, tmp_path / "free").stdout)
    limited = run(kinprune, f"{command} --train-memory 1GB --json", world, tmp_path / "limited")
    assert limited.exit_code == 0, limited.stderr
    (size,) = json.loads(limited.stdout)["sizes"]
    told = size["training_memory"]
    assert (told["limit"], told["micro_batch"], told["frozen"]) == (10**9, 16, [])
    assert told["predicted"] <= 10**9 and (told["peak"] is None or 0 < told["peak"] <= 10**9)
    assert "training_memory" not in free["sizes"][0] and size["losses"] == free["sizes"][0]["losses"]
    before, after = (kp.load(tmp_path / name).provenance["plan"]["train_memory"] for name in ("free", "limited"))
    assert (before, after) == (None, 10**9)
    shown = run(kinprune, f"{command} --train-memory 40MB", world, tmp_path / "shown")
    assert shown.exit_code == 0 and "training in 40 MB of memory: " in " ".join(shown.stdout.split())
    command = f"{command} --train-memory 9MB".replace("--bank BANK", "--bank BANK --json")
    refused = run(kinprune, command, world, tmp_path / "refused")
    assert refused.exit_code == 2 and "expected a limit of at least" in " ".join(refused.stderr.split())
    assert not (tmp_path / "refused").exists()


def test_a_limit_of_memory_is_in_a_records_key_only_where_there_is_one(world: World) -> None:
    keys = []
    for limit in (None, 10**9, 10**8):
        plan = replace(QUICK, train_memory=limit, recipe=kp.Recipe(steps=0))
        adapted = kp.adapt(world.task, world.bank, kp.Budget(keep=0.5), plan)
        record = adapted_record(adapted, adapted.sizes[0], world.task)
        assert record.details["plan"].get("train_memory") == limit
        keys.append(record.key)
    assert len(set(keys)) == 3
    before = {name: value for name, value in record.details["plan"].items() if name != "train_memory"}
    assert keys[0] == record_key(world.task.digest, {"adapted": before})
    with pytest.raises(BudgetError, match="train_memory is 0"):
        AdaptPlan(train_memory=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "no budget was given"),
        ("--keep 0.5 --train-memory 50%", "such as 200MB"),
        ("--keep 0.5 --sizes 0.5", "one of them"),
        ("--sizes 0.5,2", "--sizes is '0.5,2'"),
        ("--sizes 0.5,0.5", "different keep ratios"),
        ("--keep 0.5 --neighbours none", "all, random or farthest"),
        ("--keep 0.5 --method coin", "no method 'coin'"),
        ("--keep 0.5 --blend 3", "from 0 to 1"),
        ("--keep 0.5 --inherit uncle", "no inheritance 'uncle'"),
        ("--keep 0.5 --score-mask fuzzy", "no score mask 'fuzzy'"),
        ("--keep 0.5 --weighting heavy", "no weighting 'heavy'"),
        ("--keep 0.5 --measure guess", "no measure 'guess'"),
        ("--max-params 10", "cannot be reached"),
    ],
)
def test_refused(kinprune: Callable[..., Any], world: World, tmp_path: Path, options: str, said: str) -> None:
    result = run(kinprune, f"adapt NEW --bank BANK --steps 0 --out OUT {options}", world, tmp_path / "out")
    assert result.exit_code == 2 and said in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_bank_that_is_not_there_is_refused(kinprune: Callable[..., Any], world: World, tmp_path: Path) -> None:
    result = kinprune("adapt", world.folder, "--bank", tmp_path / "no.db", "--keep", "0.5", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "there is no bank at" in " ".join(result.stderr.split())
