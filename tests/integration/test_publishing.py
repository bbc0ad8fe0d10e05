"""What ``kinprune adapt`` leaves in a directory: models, records, exports with their latencies, and one report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kinprune as kp
from kinprune.bank import read_record
from kinprune.building import Source, build, sample_sources
from kinprune.devices import predict_onnx, time_models
from kinprune.errors import ArtifactError, DeviceError, ExportError
from kinprune.publishing import plan_destination

Cli = Callable[..., Any]
PLAN = kp.Plan(kp.Budget(keep=0.3), score_images=16, recipe=kp.Recipe(steps=1, batch_size=8))
FILES = {"README.md", "kinprune.json", "model.onnx", "model.safetensors", "record.safetensors"}


@dataclass(frozen=True)
class Family:
    """What a run of ``adapt --sizes`` wrote and said."""

    bank: Path
    data: Path
    out: Path
    said: dict[str, Any]


@pytest.fixture(scope="module")
def family(make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, kinprune: Cli) -> Family:
    root = tmp_path_factory.mktemp("publish")
    known = make_folder(root / "known", ("ant", "bat", "cow", "dog"), 8, 36)
    data = make_folder(root / "new", ("apple", "pear", "plum"), 12, 36)
    backbone = kp.load_backbone("test_resnet", num_classes=2, random=True, image_size=32)
    space = kp.find_units(backbone.model, (32, 32), head=backbone.head)
    bank = kp.create_bank(root / "bank.db", backbone, space)
    build(bank, sample_sources([Source(str(known))], 3, 2), PLAN)
    bank.close()
    words = ("adapt", data, "--bank", root / "bank.db", "--sizes", "0.6,0.3", "--steps", "2", "--batch-size", "8")
    result = kinprune(*words, "--out", root / "out", "--json")
    assert result.exit_code == 0, result.stderr
    return Family(root / "bank.db", data, root / "out", json.loads(result.stdout))


def test_every_size_is_a_directory_of_its_own_below_one_report(family: Family) -> None:
    assert {path.name for path in family.out.iterdir()} == {"keep-0.6", "keep-0.3", "report.html"}
    for folder in ("keep-0.6", "keep-0.3"):
        assert {path.name for path in (family.out / folder).iterdir()} == FILES
    assert family.said["out"] == [str(family.out / "keep-0.6"), str(family.out / "keep-0.3")]
    assert family.said["report"] == str(family.out / "report.html")
    assert "keep-0.6" not in json.dumps(family.said["sizes"])
    assert "</html>" in (family.out / "report.html").read_text(encoding="utf-8")


def test_exports_answer_as_the_models_and_their_latencies_are_told(family: Family) -> None:
    latencies = [family.said["latency_ms"], *(size["latency_ms"] for size in family.said["sizes"])]
    assert all(0 < latency < 10_000 for latency in latencies)
    artifact = kp.load(family.out / "keep-0.3")
    images = kp.decode(kp.load_task(family.data), artifact.preprocessing).test.images
    answers = predict_onnx(family.out / "keep-0.3" / "model.onnx", images.numpy())
    expected = kp.predict(artifact.model, images, artifact.preprocessing).numpy()
    np.testing.assert_allclose(_softmax(answers), expected, atol=1e-4)


def _softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(shares / shares.sum(1, keepdims=True))


def test_records_are_of_the_models_beside_them(family: Family) -> None:
    header = kp.open_bank(family.bank).header
    kept = {name: read_record(family.out / name / "record.safetensors", header) for name in ("keep-0.6", "keep-0.3")}
    for place, (name, record) in enumerate(kept.items()):
        assert record.accuracy.final == family.said["sizes"][place]["accuracy"]
        kept_units = [len(units) for units in kp.load(family.out / name).kept.values()]
        assert sum(kept_units) == record.mask.kept.sum() and record.classes == ("apple", "pear", "plum")
    assert (kept["keep-0.6"].mask.kept >= kept["keep-0.3"].mask.kept).all()


def test_latencies_are_of_the_models_in_their_order(family: Family, tmp_path: Path) -> None:
    path = family.out / "keep-0.6" / "model.onnx"
    wide = kp.load_backbone("resnet18", num_classes=3, random=True, image_size=64)
    kp.export_onnx(wide.model, tmp_path / "wide.onnx", classes=("a", "b", "c"), preprocessing=wide.preprocessing)
    small, large = time_models([path, tmp_path / "wide.onnx"])
    assert large > 5 * small  # 150 million multiplications and more, against less than one
    with pytest.raises(DeviceError, match=r"cannot run .*none\.onnx"):
        time_models([tmp_path / "none.onnx"])


def test_a_second_run_needs_leave_to_replace(family: Family, kinprune: Cli, tmp_path: Path) -> None:
    words = ("adapt", family.data, "--bank", family.bank, "--keep", "0.3", "--steps", "0", "--no-onnx")
    first = kinprune(*words, "--out", tmp_path / "one")
    assert first.exit_code == 0, first.stderr
    assert {path.name for path in (tmp_path / "one").iterdir()} == {*FILES - {"model.onnx"}, "report.html"}
    assert "report.html" in first.stdout and "latency" not in first.stdout
    again = kinprune(*words, "--out", tmp_path / "one")
    assert again.exit_code == 2 and "already holds an artifact" in again.stderr
    assert kinprune(*words, "--out", tmp_path / "one", "--overwrite").exit_code == 0


def test_a_destination_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ArtifactError, match=r"report\.html is there already"):
        plan_destination(tmp_path, ("keep-0.5", "keep-0.1"))
    assert plan_destination(tmp_path, ("keep-0.5", "keep-0.1"), overwrite=True).folders[1] == tmp_path / "keep-0.1"
    monkeypatch.setattr("kinprune.devices.onnx.importlib.util.find_spec", lambda name: None)
    assert plan_destination(tmp_path / "new").onnx is False
    with pytest.raises(ExportError, match=r"pip install .kinprune\[onnx\]"):
        plan_destination(tmp_path / "new", onnx=True)


def test_ctrl_c_while_saving_leaves_whole_files_and_says_so(
    family: Family, kinprune: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    words = ("adapt", family.data, "--bank", family.bank, "--sizes", "0.6,0.3", "--steps", "0", "--no-onnx")
    with monkeypatch.context() as patch:
        patch.setattr("kinprune.publishing.save", interrupt)
        result = kinprune(*words, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "no model was written yet" in " ".join(result.stderr.split())
    with monkeypatch.context() as patch:
        patch.setattr("kinprune.publishing.write_report", interrupt)
        result = kinprune(*words, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "is whole, --overwrite completes it" in " ".join(result.stderr.split())
    assert kp.load(tmp_path / "out" / "keep-0.3").classes == ("apple", "pear", "plum")
    assert not (tmp_path / "out" / "report.html").exists()
    assert kinprune(*words, "--out", tmp_path / "out", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "report.html").exists()


def test_one_image_a_class_is_enough(family: Family, kinprune: Cli, tmp_path: Path) -> None:
    words = ("adapt", family.data, "--bank", family.bank, "--shots", "1", "--keep", "0.3", "--steps", "2", "--no-onnx")
    result = kinprune(*words, "--out", tmp_path / "one", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert 0 <= said["sizes"][0]["accuracy"] <= 1 and len(said["sizes"][0]["losses"]) == 2


def test_images_of_kin_are_shown_and_damaged_ones_refused_before_any_work(
    family: Family, kinprune: Cli, tmp_path: Path
) -> None:
    known = tmp_path / "known"
    shutil.copytree(family.bank.parent / "known", known)
    words = ("adapt", family.data, "--bank", family.bank, "--keep", "0.3", "--steps", "0", "--no-onnx")
    plain = kinprune(*words, "--out", tmp_path / "plain")
    shown = kinprune(*words, "--out", tmp_path / "shown", "--kin-data", known)
    assert plain.exit_code == shown.exit_code == 0, shown.stderr
    pictures = [(tmp_path / name / "report.html").read_text().count("data:image/") for name in ("plain", "shown")]
    assert pictures[1] > pictures[0]
    for path in (known / "ant").iterdir():
        path.write_bytes(b"no image")
    refused = kinprune(*words, "--out", tmp_path / "refused", "--kin-data", known)
    assert refused.exit_code == 2 and "ant" in refused.stderr and not (tmp_path / "refused").exists()
