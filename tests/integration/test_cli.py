"""The command line, all the way: units, prune, eval, predict, export, for people and for scripts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kinprune as kp

Cli = Callable[..., Any]

VIT = ("--model", "test_vit", "--random", "--image-size", "32")
RESNET = ("--model", "test_resnet", "--random", "--image-size", "32")
QUICK = ("--steps", "3", "--batch-size", "8")

PRUNE_KEYS = {
    "device",
    "precision",
    "predicted_ms",
    "accuracy",
    "accuracy_closed_form",
    "accuracy_dense",
    "best_step",
    "budget",
    "costs",
    "curve",
    "kept",
    "losses",
    "method",
    "model",
    "note",
    "out",
    "reconstructed",
    "seconds",
    "seed",
    "slack",
    "stopped",
    "task",
    "versions",
    "whole",
}
COSTS = {"units", "parameters", "macs", "weight_bytes", "peak_memory_bytes"}


def one_object(result: Any) -> dict[str, Any]:
    """The one JSON object on standard output of a command that went well."""
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


def script() -> list[str]:
    """The console script, or what it does where the package is not installed."""
    found = shutil.which("kinprune", path=str(Path(sys.executable).parent))
    return [found] if found else [sys.executable, "-c", "from kinprune.cli import main; main()"]


def environment() -> dict[str, str]:
    source = str(Path(kp.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "TERM": "xterm"}


@pytest.fixture(scope="module")
def made(kinprune: Cli, fruit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An artifact, and what prune said of it in JSON."""
    out = tmp_path_factory.mktemp("made") / "small"
    result = kinprune("prune", fruit, *VIT, *QUICK, "--keep", "0.5", "--max-params", "60%", "--out", out, "--json")
    return out, one_object(result)


def test_units_say_what_can_be_pruned_and_what_cannot(kinprune: Cli) -> None:
    result = kinprune("units", "test_vit", "--image-size", "32")
    assert result.exit_code == 0 and result.stderr == ""
    shown = result.stdout
    assert "blocks.0.attn" in shown and "2 x 32" in shown and "the classifier's classes" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "1,164 units in 12 groups. Parameters 365 k (down to 168 k)" in shown


def test_units_as_json(kinprune: Cli) -> None:
    found = one_object(kinprune("units", "test_vit", "--image-size", "32", "--num-classes", "3", "--json"))
    assert set(found) == {"model", "image_size", "fingerprint", "costs", "smallest", "groups", "whole"}
    assert found["image_size"] == [32, 32] and set(found["costs"]) == COSTS
    assert sum(group["units"] for group in found["groups"]) == found["costs"]["units"] == 1164
    assert {group["kind"] for group in found["groups"]} == {"head", "node"}
    assert all(found["smallest"][name] < found["costs"][name] for name in COSTS)
    attention = found["groups"][0]
    # qkv and projection of 64 channels; the projection's bias stays when heads go.
    assert attention["units"] * attention["width"] == 64
    assert attention["parameters"] == 3 * (64 * 64 + 64) + 64 * 64
    streamed = one_object(kinprune("units", "test_vit", "--image-size", "32", "--stream", "--json"))
    assert "channel" in {group["kind"] for group in streamed["groups"]}


def test_prune_for_people(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    result = kinprune("prune", fruit, *VIT, *QUICK, "--keep", "50%", "--out", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert result.stderr == "fruit: 24 training and 6 test images of 3 classes\n"
    lines = result.stdout.splitlines()
    assert any("units" in line and "1.16 k" in line and "582" in line and "50.0%" in line for line in lines)
    assert lines[-1] == f"Saved to {tmp_path / 'small'}"
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        "README.md",
        "kinprune.json",
        "model.safetensors",
    ]


def test_prune_as_json(made: tuple[Path, dict[str, Any]]) -> None:
    out, said = made
    assert set(said) == PRUNE_KEYS
    assert said["out"] == str(out) and said["task"] == "fruit" and said["model"] == "test_vit"
    assert said["budget"] == {"keep": 0.5, "parameters": int(0.6 * said["whole"]["parameters"])}
    assert set(said["costs"]) == set(said["whole"]) == COSTS
    assert said["costs"]["units"] == sum(said["kept"].values()) == 582
    assert len(said["losses"]) == 3 and said["stopped"] is False and said["seed"] == 0
    assert set(said["versions"]) == {"kinprune", "torch", "timm", "python"}


def test_the_artifact_is_what_prune_said(made: tuple[Path, dict[str, Any]]) -> None:
    out, said = made
    artifact = kp.load(out)
    assert artifact.classes == ("apple", "pear", "plum")
    assert {name: len(kept) for name, kept in artifact.kept.items()} == said["kept"]
    parameters = list(artifact.model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == said["costs"]["parameters"]
    assert artifact.metrics["accuracy"] == said["accuracy"]


def test_eval_measures_the_accuracy_that_prune_reported(
    kinprune: Cli, fruit: Path, made: tuple[Path, dict[str, Any]]
) -> None:
    out, said = made
    found = one_object(kinprune("eval", out, fruit, "--json", "--batch-size", "5"))
    assert set(found) == {"artifact", "task", "classes", "accuracy", "loss", "confusion", "per_class", "n"}
    assert found["accuracy"] == said["accuracy"]
    assert found["n"] == np.sum(found["confusion"]) == 6
    people = kinprune("eval", out, fruit)
    assert people.exit_code == 0 and people.stderr == ""
    assert f"Accuracy {found['accuracy']:.2%} on 6 images, loss {found['loss']:.3f}." in people.stdout


def test_predict_files_and_folders(kinprune: Cli, fruit: Path, made: tuple[Path, dict[str, Any]]) -> None:
    out, _ = made
    first = fruit / "pear" / "0003.png"
    found = one_object(kinprune("predict", out, first, fruit / "apple", "--top", "2", "--json"))
    assert set(found) == {"artifact", "predictions"}
    images = [answer["image"] for answer in found["predictions"]]
    assert images == [str(first), *(str(fruit / "apple" / f"{number:04d}.png") for number in range(10))]
    for answer in found["predictions"]:
        (best, second) = answer["classes"]
        assert best["probability"] >= second["probability"] and best["name"] != second["name"]
    people = kinprune("predict", out, first)
    assert people.exit_code == 0
    best = found["predictions"][0]["classes"][0]
    assert people.stdout == f"{first}: {best['name']} ({best['probability']:.1%})\n"
    every = one_object(kinprune("predict", out, first, "--top", "99", "--json"))["predictions"][0]["classes"]
    assert {answer["name"] for answer in every} == {"apple", "pear", "plum"}
    assert sum(answer["probability"] for answer in every) == pytest.approx(1, abs=1e-5)


def test_export_answers_as_predict_does(
    kinprune: Cli, fruit: Path, made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out, _ = made
    target = tmp_path / "fruit.onnx"
    found = one_object(kinprune("export", out, "--out", target, "--json"))
    assert {"artifact", "format", "path", "bytes", "max_difference", "opset"} <= set(found)
    assert found["path"] == str(target) and found["bytes"] == target.stat().st_size
    assert 0 <= found["max_difference"] <= 1e-4
    artifact, image = kp.load(out), fruit / "plum" / "0000.png"
    pixels = kp.decode_image(image, artifact.preprocessing).numpy()[None]
    logits = kp.predict_onnx(target, pixels)[0]
    answer = one_object(kinprune("predict", out, image, "--json"))["predictions"][0]["classes"][0]
    assert artifact.classes[int(logits.argmax())] == answer["name"]
    assert float(np.exp(logits - logits.max()).max() / np.exp(logits - logits.max()).sum()) == pytest.approx(
        answer["probability"], abs=1e-4
    )


@pytest.mark.parametrize("model", [VIT, RESNET], ids=["test_vit", "test_resnet"])
def test_the_same_seed_gives_the_same_artifact_bit_for_bit(
    kinprune: Cli, fruit: Path, tmp_path: Path, model: tuple[str, ...]
) -> None:
    def prune(name: str, seed: int) -> list[bytes]:
        out = tmp_path / name
        one_object(kinprune("prune", fruit, *model, *QUICK, "--keep", "0.4", "--seed", seed, "--out", out, "--json"))
        return [(out / part).read_bytes() for part in ("model.safetensors", "kinprune.json")]

    first, again, other = prune("first", 3), prune("again", 3), prune("other", 4)
    assert first == again
    assert first[0] != other[0]


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        (["--max-params", "70%"], {"parameters": 0.7}),
        (["--max-macs", "55%"], {"macs": 0.55}),
        (["--max-weights", "900kB"], {"weight_bytes": 900_000}),
        (["--max-memory", "4MB"], {"peak_memory_bytes": 4_000_000}),
        (["--max-params", "0.25M", "--max-macs", "60%"], {"parameters": 250_000, "macs": 0.6}),
    ],
)
def test_every_limit_holds_and_the_tightest_is_used_up(
    kinprune: Cli, fruit: Path, tmp_path: Path, options: list[str], limits: dict[str, float]
) -> None:
    said = one_object(kinprune("prune", fruit, *VIT, "--steps", "0", *options, "--out", tmp_path / "a", "--json"))
    shares = []
    for name, limit in limits.items():
        allowed = int(limit * said["whole"][name]) if limit < 1 else int(limit)
        assert said["budget"][name] == allowed
        shares.append(said["costs"][name] / allowed)
    assert 0.99 <= max(shares) <= 1


def test_rounds_prune_to_the_same_counts_as_one_shot(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    rounds = ("--rounds", "3", "--round-steps", "2")
    common = ("prune", fruit, *RESNET, *QUICK, "--keep", "0.25", "--json")
    once = one_object(kinprune(*common, "--out", tmp_path / "once"))
    thrice = one_object(kinprune(*common, *rounds, "--out", tmp_path / "thrice"))
    assert once["kept"] == thrice["kept"]
    assert kp.load(tmp_path / "once").kept != kp.load(tmp_path / "thrice").kept


def test_stream_cuts_the_residual_stream(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    common = ("prune", fruit, *RESNET, "--steps", "0", "--keep", "0.5", "--json")
    without = one_object(kinprune(*common, "--out", tmp_path / "a"))
    with_stream = one_object(kinprune(*common, "--stream", "--out", tmp_path / "b"))
    assert set(without["kept"]) < set(with_stream["kept"])
    assert with_stream["costs"]["parameters"] < without["costs"]["parameters"]
    assert one_object(kinprune("eval", tmp_path / "b", fruit, "--json"))["accuracy"] == with_stream["accuracy"]


def test_widths_are_rounded_to_a_multiple(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    common = ("prune", fruit, *RESNET, "--steps", "0", "--max-params", "45%", "--json")
    odd = one_object(kinprune(*common, "--allocation", "global", "--out", tmp_path / "odd"))
    rounded = one_object(kinprune(*common, "--allocation", "global", "--multiple", "8", "--out", tmp_path / "even"))
    assert any(count % 8 for count in odd["kept"].values())
    assert not any(count % 8 for count in rounded["kept"].values())
    assert rounded["costs"]["parameters"] <= rounded["budget"]["parameters"]


def test_classes_and_shots_choose_the_images(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    options = ("--classes", "plum, apple", "--shots", "2", "--steps", "0", "--keep", "0.5")
    result = kinprune("prune", fruit, *VIT, *options, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stderr == "fruit: 4 training and 4 test images of 2 classes\n"
    assert kp.load(out).classes == ("plum", "apple")
    assert one_object(kinprune("eval", out, fruit, "--json"))["n"] == 4


def test_no_steps_leave_the_closed_form(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    options = ("--steps", "0", "--keep", "0.2", "--json")
    said = one_object(kinprune("prune", fruit, *RESNET, *options, "--out", tmp_path / "a"))
    assert said["losses"] == [] and said["accuracy"] == said["accuracy_closed_form"] > 0.5


def test_parquet_data(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [(path.read_bytes(), name) for name in ("apple", "plum") for path in sorted((fruit / name).iterdir())]
    columns = {"picture": [{"bytes": image} for image, _ in files], "thing": [name for _, name in files]}
    parquet.write_table(arrow.table(columns), tmp_path / "fruit.parquet")
    options = ("--label-column", "thing", "--steps", "0", "--keep", "0.5", "--json")
    said = one_object(kinprune("prune", tmp_path / "fruit.parquet", *VIT, *options, "--out", tmp_path / "a"))
    found = one_object(
        kinprune("eval", tmp_path / "a", tmp_path / "fruit.parquet", "--label-column", "thing", "--json")
    )
    assert found["classes"] == ["apple", "plum"] and found["accuracy"] == said["accuracy"]


FACTORY = """
from torch import nn

def build(num_classes=5):
    print("a word from the factory")
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""


def test_a_model_of_ones_own(kinprune: Cli, fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_small_net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    options = ("--image-size", "32", "--keep", "0.5", "--steps", "2", "--json")
    said = one_object(kinprune("prune", fruit, "--model", "own_small_net:build", *options, "--out", "a"))
    assert list(said["kept"].values()) == [8, 4]
    assert one_object(kinprune("eval", "a", fruit, "--json"))["accuracy"] == said["accuracy"]


def test_an_artifact_is_replaced_when_asked(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    for keep in ("0.5", "0.25"):
        one_object(
            kinprune("prune", fruit, *VIT, "--steps", "0", "--keep", keep, "--out", out, "--overwrite", "--json")
        )
    assert sum(map(len, kp.load(out).kept.values())) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_names_of_classes_are_shown_as_they_are(
    kinprune: Cli, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data = make_folder(tmp_path / "[bold]data", ("[red]", ":smile:"), 4, 32)
    out = tmp_path / "out[b]"
    pruned = kinprune("prune", data, *VIT, "--steps", "0", "--keep", "0.5", "--out", out)
    assert pruned.exit_code == 0 and pruned.stdout.endswith(f"Saved to {out}\n")
    shown = kinprune("eval", out, data).stdout
    assert "[red]" in shown and ":smile:" in shown


def test_help_has_the_sections_in_order_and_fits_80_columns(kinprune: Cli) -> None:
    result = kinprune("prune", "--help")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    titles = [line.rstrip(":") for line in lines if line and not line.startswith((" ", "Usage"))]
    assert titles == [
        "Arguments",
        "Data",
        "Model",
        "Budget (one or more, all of them hold)",
        "Device",
        "Pruning",
        "Fine-tuning",
        "Running and output",
        "Help",
    ]
    assert max(map(len, lines)) <= 80


def test_version(kinprune: Cli) -> None:
    result = kinprune("--version")
    assert (result.exit_code, result.stdout) == (0, f"{kp.__version__}\n")


def test_help_is_there_at_once() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([*script(), "--help"], capture_output=True, text=True, env=environment())
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and "Commands:" in done.stdout
    assert min(seconds) < 1.5
    program = (
        "import sys\nfrom kinprune.cli.app import app\napp(['prune', '--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'torchvision', 'timm', 'numpy', 'PIL'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "[]\n")


def interrupt(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """Run prune on a terminal, send SIGINT once a step of 20,000 was taken; exit code, stdout, the terminal."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*script(), *arguments], stdout=subprocess.PIPE, stderr=theirs, stdin=theirs, cwd=folder, env=environment()
    )
    os.close(theirs)
    shown, signalled = b"", False
    try:
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux's way to say that the other side has closed
                break
            if not part:
                break
            shown += part
            if not signalled and re.search(rb"[1-9]\d*/20000", shown):
                process.send_signal(signal.SIGINT)
                signalled = True
        stdout, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(ours)
    return process.returncode, stdout.decode(), shown.decode(errors="replace")


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal and SIGINT")
def test_ctrl_c_while_fine_tuning_saves_the_best_model_so_far(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    options = [*RESNET, "--keep", "0.5", "--steps", "20000", "--batch-size", "8", "--json"]
    code, stdout, terminal = interrupt(["prune", str(fruit), *options, "--out", "a"], tmp_path)
    assert code == 0, terminal
    said = json.loads(stdout)
    assert said["stopped"] is True and len(said["losses"]) < 20000
    assert "fine-tuning" in terminal and "Traceback" not in terminal
    assert one_object(kinprune("eval", tmp_path / "a", fruit, "--json"))["accuracy"] == said["accuracy"]


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal and SIGINT")
def test_ctrl_c_before_the_last_fine_tuning_writes_nothing(fruit: Path, tmp_path: Path) -> None:
    options = [*RESNET, "--keep", "0.5", "--rounds", "2", "--round-steps", "20000", "--batch-size", "8"]
    code, stdout, terminal = interrupt(["prune", str(fruit), *options, "--out", "a"], tmp_path)
    assert (code, stdout) == (130, "")
    assert "interrupted; nothing was written" in terminal and "Traceback" not in terminal
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_do_not_wait_in_circles_beside_others(given: dict[str, str], spins: str | None) -> None:
    program = (
        "import os, sys\nfrom kinprune.cli import main\nsys.argv = ['kinprune', '--version']\n"
        "try:\n    main()\nfinally:\n    print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)\n"
    )
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ran = subprocess.run([sys.executable, "-c", program], env=plain | given, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == f"{spins} False", ran.stderr
