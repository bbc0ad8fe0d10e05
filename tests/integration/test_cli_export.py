"""The command line's export in every format and precision, and predict and eval of what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kinprune as kp

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Cli = Callable[..., Any]


def one_object(result: Any) -> dict[str, Any]:
    """The one JSON object on standard output of a command that went well."""
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.fixture(scope="module")
def artifact(kinprune: Cli, fruit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "small"
    words = ("--model", "test_resnet", "--random", "--image-size", "32", "--keep", "0.5", "--steps", "5")
    one_object(kinprune("prune", fruit, *words, "--batch-size", "8", "--out", out, "--json"))
    return out


@pytest.fixture(scope="module")
def int8(
    kinprune: Cli, fruit: Path, artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A file in int8, and what export said of it in JSON."""
    out = tmp_path_factory.mktemp("int8") / "fruit.onnx"
    words = ("--precision", "int8", "--data", fruit, "--out", out, "--json")
    return out, one_object(kinprune("export", artifact, *words))


def test_int8_as_json(kinprune: Cli, fruit: Path, artifact: Path, int8: tuple[Path, dict[str, Any]]) -> None:
    out, said = int8
    assert set(said) == {
        "accuracy",
        "accuracy_exported",
        "agreement",
        "artifact",
        "bytes",
        "format",
        "in_float",
        "max_difference",
        "n",
        "opset",
        "path",
        "precision",
        "runtime",
        "task",
    }
    assert said["path"] == str(out) and said["bytes"] == out.stat().st_size and said["precision"] == "int8"
    assert set(said["agreement"]) == {"images", "share", "by_chance", "mean_difference"}
    assert said["agreement"]["images"] == 24 and said["agreement"]["share"] > 0.9  # the training part alone
    assert said["n"] == 6
    assert said["accuracy"] == one_object(kinprune("eval", artifact, fruit, "--json"))["accuracy"]
    assert said["accuracy_exported"] == one_object(kinprune("eval", out, fruit, "--json"))["accuracy"]


def test_predict_and_eval_take_the_file(
    kinprune: Cli, fruit: Path, artifact: Path, int8: tuple[Path, dict[str, Any]]
) -> None:
    out, _ = int8
    found = one_object(kinprune("predict", out, fruit / "pear", "--top", "3", "--json"))
    assert found["artifact"] == str(out) and len(found["predictions"]) == 10
    expected = one_object(kinprune("predict", artifact, fruit / "pear", "--top", "3", "--json"))
    for ours, theirs in zip(found["predictions"], expected["predictions"], strict=True):
        assert ours["image"] == theirs["image"]
        odds = {answer["name"]: answer["probability"] for answer in theirs["classes"]}
        assert sum(answer["probability"] for answer in ours["classes"]) == pytest.approx(1, abs=1e-5)
        assert all(abs(answer["probability"] - odds[answer["name"]]) < 0.2 for answer in ours["classes"])
    people = kinprune("eval", out, fruit)
    assert people.exit_code == 0 and "on 6 images" in people.stdout
    refused = kinprune("predict", out, fruit / "pear", "--device", "cuda")
    assert refused.exit_code == 2 and "an exported file runs on the CPU" in refused.stderr


def test_predict_of_an_onnx_file_imports_no_pytorch(fruit: Path, int8: tuple[Path, dict[str, Any]]) -> None:
    words = ["predict", str(int8[0]), str(fruit / "plum"), "--threads", "1", "--json"]
    program = (
        "import sys\nfrom kinprune.cli.app import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'torchvision', 'timm', 'safetensors', 'onnx'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(kp.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert len(json.loads(done.stdout)["predictions"]) == 10


def test_fp16_for_people(kinprune: Cli, fruit: Path, artifact: Path, tmp_path: Path) -> None:
    result = kinprune("export", artifact, "--precision", "fp16", "--data", fruit, "--out", tmp_path / "half.onnx")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert "fp16, opset 20, logits within" in first and "of PyTorch's" in first
    assert second.startswith("Accuracy ") and second.endswith(" before the export.") and "6 test images" in second


def test_pt2_goes_beside_the_artifact_and_goes_with_it(
    kinprune: Cli, fruit: Path, artifact: Path, tmp_path: Path
) -> None:
    copy = kp.save(kp.load(artifact), tmp_path / "copy")
    said = one_object(kinprune("export", copy, "--format", "pt2", "--json"))
    assert said["path"] == str(copy / "model.pt2") and said["precision"] == "fp32" and said["max_difference"] <= 1e-4
    assert "accuracy" not in said and (copy / "model.pt2").stat().st_size == said["bytes"]
    found, expected = (
        one_object(kinprune("predict", target, fruit / "apple", "--json"))["predictions"]
        for target in (copy / "model.pt2", copy)
    )
    assert [one["classes"][0]["name"] for one in found] == [one["classes"][0]["name"] for one in expected]
    kp.save(kp.load(copy), copy, overwrite=True)
    assert not (copy / "model.pt2").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--format", "tflite"], "there is no export format 'tflite', expected onnx, executorch, pt2"),
        (["--precision", "int4"], "there is no precision 'int4', expected fp32, fp16, int8"),
        (["--precision", "int8"], "int8 is calibrated on labelled images, and none are given: add --data"),
        (["--format", "pt2", "--precision", "fp16"], "pt2 is written in fp32 only, not in fp16"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_work(kinprune: Cli, words: list[str], problem: str) -> None:
    result = kinprune("export", "no-such-artifact", *words)
    assert result.exit_code == 2 and problem in result.stderr and result.stdout == ""


def test_files_that_are_no_exports_are_refused(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.pt2"):
        (tmp_path / name).write_bytes(b"nothing")
        for words in (("predict", tmp_path / name, fruit / "pear"), ("eval", tmp_path / name, fruit)):
            result = kinprune(*words)
            assert result.exit_code == 2 and result.stderr.startswith("kinprune: "), result.output
