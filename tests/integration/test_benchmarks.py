"""The benchmarks run, on timm's smallest models, and what they say can be read."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kinprune as kp
from kinprune.building import Source, sample_sources

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install 'kinprune[dev]'")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the engine benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module("engine")
    torch.set_num_threads(threads)


def test_coverage_tells_what_each_tool_did_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "coverage.jsonl"
    earlier = {"model": "test_vit", "tool": "torch-pruning", "runs": False, "error": "of before", "seconds": 1.0}
    out.write_text(json.dumps(earlier) + "\n")
    command = [sys.executable, str(BENCHMARKS / "coverage.py"), "--models", "test_vit,no_such_model", "--skip-export"]
    done = subprocess.run([*command, "--out", str(out), "--json"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["models"] == 2 and found["seconds"] > 0
    assert found["Kinprune: pruned inside blocks, runs"] == "1 of 2"
    assert found["Kinprune: equals the masked model within 1e-9"] == "1 of 1"
    assert found["torch-pruning: runs"] == "0 of 2"
    rows = {(row["model"], row["tool"]): row for row in map(json.loads, out.read_text().splitlines())}
    assert len(rows) == 4 and rows["test_vit", "torch-pruning"] == earlier
    assert "no_such_model" in rows["no_such_model", "kinprune"]["error"]
    row = rows["test_vit", "kinprune"]
    assert row["family"] == "vision_transformer" and row["costs_exact"] and not row["stream"]
    assert row["groups"].keys() == {"head", "node"} and row["compared"][0] == row["compared"][1]
    assert row["with_stream"]["parameters"][1] < row["parameters"][1] < row["parameters"][0]
    page = out.with_suffix(".md").read_text()
    assert page.count("\n| test_vit | vision_transformer |") == 1 and "| no_such_model |" in page


def test_engine_times_both_tools(engine: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engine.json"
    words = ["--models", "test_resnet", "--repeats", "1", "--threads", "1", "--skip-memory", "--out", str(out)]
    engine.main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["times_faster"] > 0 and found["seconds"] > 0
    assert found["times_faster"] == {"test_resnet": round(row["times_faster"], 1)}
    own, other = row["kinprune_with_streams"], row["torch_pruning"]
    assert own["total"] == pytest.approx(own["find_units"] + own["select"] + own["extract"])
    assert other["total"] == pytest.approx(other["init"] + other["step"])
    # Both cut every dimension by half, so that about as much must be left.
    assert own["parameters"] == pytest.approx(other["parameters"], rel=0.1)
    assert "test_resnet" in out.with_suffix(".md").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc, which is Linux's")
def test_engine_measures_memory() -> None:
    # In a process of its own: memory that earlier tests have given back would hide what is taken.
    script = Path(__file__).parents[2] / "benchmarks" / "engine.py"
    command = [sys.executable, str(script), "--fresh", "resnet18", "kinprune_in_blocks", "--threads", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["first_total"] > 0 and found["memory_bytes"] > 0


def test_kin_ranks_and_says_how_long_it_took(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    words = "--tasks 40 1200 --features 64 --images 200 --targets 2 --repeats 1 --loop 10 --measured 40 --json"
    importlib.import_module("kin").main([*words.split(), "--out", str(tmp_path / "kin.json")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] > 0
    rows = json.loads((tmp_path / "kin.json").read_text())["rows"]
    assert [row["tasks"] for row in rows] == [40, 1200] and all(row["recall"] >= 0.9 for row in rows)


def test_adapt_says_where_the_seconds_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    words = "--tasks 30 --keep 0.1 --steps 1 --repeats 1 --json"
    importlib.import_module("adapt").main([*words.split(), "--out", str(tmp_path / "adapt.json")])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = json.loads((tmp_path / "adapt.json").read_text())
    assert found["tasks"] == 30 and found["stages"].keys() >= {"features", "kin", "vote", "inherit", "fine-tune"}
    assert told["of_the_bank"] == pytest.approx(
        sum(found["stages"][name] for name in ("kin", "vote", "inherit")), abs=0.01
    )


def test_build_runs_every_way_on_the_same_tasks_and_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make_folder: Callable[..., Path],
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))
    module = importlib.import_module("benchmarks.build")
    folder = make_folder(tmp_path / "data", ("ant", "bat", "cat"), 10, 32)

    def prepare(model: str, options: object) -> tuple[kp.Backbone, list[Source]]:
        """A small model without weights of its own, as there need not be any here."""
        backbone = kp.load_backbone("test_resnet", num_classes=2, random=True, image_size=32)
        return backbone, sample_sources([Source(str(folder))], 1, 2)

    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(module, "warm_up", lambda *args: None)
    plan = kp.Plan(kp.Budget(keep=0.3), rounds=2, round_steps=1, recipe=kp.Recipe(steps=2, batch_size=8))
    out = tmp_path / "build.json"
    words = ["--models", "resnet18", "--tasks", "1", "--out", str(out), "--json"]
    module.main([*words, "--ways", "kinprune", "plain"], plan)
    first = [json.loads(text) for text in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["way"] for row in first] == ["kinprune", "plain"]
    capsys.readouterr()
    module.main(words, plan)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["times_faster"]
    assert len(told) == 3 and all(times > 0 for times in told.values())
    rows = json.loads(out.read_text())["rows"]
    assert rows[:2] == first and sorted(row["way"] for row in rows) == sorted(module.WAYS)
    # torch-pruning cut the same layers to the same widths.
    assert len({row["parameters"] for row in rows}) == 1
    assert all(0 <= row["accuracy"] <= 1 and row["processor"] > 0 for row in rows)
    page = out.with_suffix(".md").read_text()
    assert "| resnet18 | cpu, 1 | plain, taught | 1 |" in page and "last steps" in page


def test_stacked_models_take_a_step_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("stacked")
    monkeypatch.setattr(module, "SIZE", 32)
    monkeypatch.setattr(module, "BATCH", 2)
    module.main(["--models", "2", "--repeats", "1", "--out", str(tmp_path / "stacked.json"), "--json"])
    assert json.loads(capsys.readouterr().out)["2"] > 0
    models = [module.small(seed).train() for seed in range(2)]
    images, labels = torch.randn(2, 2, 3, 32, 32), torch.tensor([[0, 1], [2, 3]])
    together = module.stacked_step(models, images, labels)()
    for number, model in enumerate(models):
        torch.nn.functional.cross_entropy(model(images[number]), labels[number]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][number], parameter.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc, which is Linux's")
def test_training_memory_tells_peaks_and_refusals(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make_folder: Callable[..., Path],
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("training_memory")
    monkeypatch.setattr(module, "LIMITS", (None, 200, 1))

    def prune(model: str, keep: float, folder: Path, options: object) -> dict[str, float]:
        """A small model without weights of its own, as there need not be any here."""
        backbone = kp.load_backbone("test_vit", num_classes=2, random=True, image_size=32)
        task = kp.load_task(make_folder(tmp_path / "data", ("ant", "bat"), 12, 32))
        found: dict[str, float] = module.write_down(folder, backbone, kp.decode(task, backbone.preprocessing), keep)
        return found

    monkeypatch.setattr(module, "prune", prune)
    out = tmp_path / "memory.json"
    words = ["--models", "resnet18", "--keep", "0.5", "--threads", "1", "--steps", "2", "--out", str(out), "--json"]
    module.main(words)
    found = json.loads(capsys.readouterr().out)
    assert (found["held"], found["refused"]) == ("1 of 1", 1)
    free, limited, refused = json.loads(out.read_text())["rows"]
    assert free["predicted"] is None and free["peak"] > 0 and "expected a limit of at least" in refused["refused"]
    assert 0 < limited["peak"] <= limited["predicted"] <= 200 * 10**6
    assert out.with_suffix(".md").read_text().count("| resnet18 | 0.5 | 1 |") == 3
