"""Bad input of every kind: one message that says what was wrong and what to do, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

Cli = Callable[..., Any]

PRUNE = "prune {fruit} --out {out} --image-size 32 --steps 0"
VIT = "--model test_vit --random"
HALF = "--keep 0.5"


def write_images(make_folder: Callable[..., Path], place: Path) -> None:
    """Data that is wrong, each in its own way."""
    make_folder(place / "one-class", ("apple",), 3)
    make_folder(place / "empty-class", ("apple", "pear"), 3)
    (place / "empty-class" / "plum").mkdir()
    make_folder(place / "other-test" / "train", ("apple", "pear"), 3)
    make_folder(place / "other-test" / "test", ("apple", "pear", "mango"), 3)
    make_folder(place / "unreadable", ("apple", "pear"), 3)
    (place / "unreadable" / "pear" / "0001.png").write_bytes(b"this is no image")
    (place / "unreadable" / "apple" / "0002.png").write_bytes(b"")
    make_folder(place / "single-image", ("apple", "pear"), 3)
    for number in (1, 2):
        (place / "single-image" / "pear" / f"000{number}.png").unlink()
    (place / "empty").mkdir()
    (place / "fruit.zip").write_bytes(b"PK")
    (place / "flat").mkdir()
    shutil.copy(place / "one-class" / "apple" / "0000.png", place / "flat" / "a.png")
    shutil.copytree(place / "flat", place / "no-images")
    (place / "no-images" / "a.png").rename(place / "no-images" / "a.txt")


def write_weights(place: Path) -> None:
    """Weights files that are wrong, and one that is right."""
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    state = model.state_dict()
    save_file(state, place / "vit.safetensors", {"architecture": "test_vit"})
    save_file({key: value for key, value in state.items() if "fc2" not in key}, place / "missing.safetensors")
    save_file(state | {"blocks.0.mlp.fc1.weight": torch.zeros(7, 64)}, place / "shape.safetensors")
    save_file(state | {"norm.weight": torch.full((64,), torch.nan)}, place / "nan.safetensors")
    save_file(timm.create_model("test_resnet").state_dict(), place / "other.safetensors")
    save_file(state, place / "said.safetensors", {"architecture": "resnet50"})
    (place / "cut.safetensors").write_bytes((place / "vit.safetensors").read_bytes()[:100_000])
    (place / "text.safetensors").write_text("weights")
    torch.save(state, place / "vit.pth")


FACTORIES = """
from torch import nn

number = 3

def bilud():
    return nn.Identity()

def module_of_another_kind():
    return {"weights": 3}

def fails(num_classes):
    raise RuntimeError("no flux capacitor")

def no_logits():
    return nn.Conv2d(3, 4, 3)
"""


def write_artifacts(kinprune: Cli, fruit: Path, place: Path) -> None:
    """An artifact, and copies of it that were damaged."""
    good = place / "good"
    made = kinprune(*shlex.split(f"prune {fruit} --out {good} {VIT} --image-size 32 --steps 0 {HALF}"))
    assert made.exit_code == 0, made.output

    def damaged(name: str, file: str, change: Callable[[bytes], bytes]) -> None:
        shutil.copytree(good, place / name)
        path = place / name / file
        path.write_bytes(change(path.read_bytes()))

    damaged("cut", "model.safetensors", lambda data: data[:-1000])
    damaged("flipped", "model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    damaged("edited", "kinprune.json", lambda data: data.replace(b'"apple"', b'"grape"'))
    damaged("newer", "kinprune.json", lambda data: re.sub(rb'"format": \d+', b'"format": 999', data))
    damaged("garbled", "kinprune.json", lambda data: data[: len(data) // 2])
    shutil.copytree(good, place / "halved")
    (place / "halved" / "model.safetensors").unlink()


@pytest.fixture(scope="session")
def place(
    kinprune: Cli, fruit: Path, make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Everything that is wrong, in one folder."""
    folder = tmp_path_factory.mktemp("wrong")
    write_images(make_folder, folder)
    write_weights(folder)
    write_artifacts(kinprune, fruit, folder)
    (folder / "wrong_factories.py").write_text(FACTORIES)
    (folder / "wrong_import.py").write_text("import a_package_that_nobody_has\n")
    (folder / "wrong_syntax.py").write_text("def f(:\n")
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of files."""
    paths = (path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def refused(kinprune: Cli, command: str, folders: dict[str, Path], watched: list[Path]) -> str:
    """Run a command that must be refused, leaving every watched folder as it was; its one message."""
    before = [contents(folder) for folder in watched]
    result = kinprune(*shlex.split(command.format(**folders)))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert [contents(folder) for folder in watched] == before
    return str(result.stderr)


DATA = [
    ("missing", "{place}/nowhere", ["nowhere does not exist", "an image folder"]),
    ("empty", "{place}/empty", ["empty holds no images", "an image folder"]),
    ("no images in it", "{place}/no-images", ["no-images holds no images", "an image folder"]),
    ("no class folders", "{place}/flat", ["flat holds images but no class folders", "in a folder of its name"]),
    ("unreadable images", "{place}/unreadable", ["2 images", "pear/0001.png", "apple/0002.png", "replace or remove"]),
    ("one class", "{place}/one-class", ["'apple'", "at least two"]),
    ("empty class", "{place}/empty-class", ["'plum' is empty", "add images"]),
    ("single image", "{place}/single-image", ["'pear' has one image", "0000.png", "add images"]),
    ("class only in test", "{place}/other-test", ["'mango' is in the test part", "fix the data"]),
    ("archive", "{place}/fruit.zip", ["fruit.zip", "unknown type '.zip'", "unpack"]),
    ("unknown torchvision set", "torchvision:CIFAR11?root={place}", ["'CIFAR11'", "did you mean"]),
    ("columns of a folder", "{fruit} --label-column x", ["has no columns", "parquet"]),
    ("unknown class", "{fruit} --classes apple,peer", ["no class 'peer'", "did you mean 'pear'"]),
    ("class given twice", "{fruit} --classes apple,apple", ["'apple' is named more than once"]),
    ("one class chosen", "{fruit} --classes apple", ["1 class", "at least two"]),
    ("no class chosen", "{fruit} --classes ,", ["0 classes", "at least two"]),
    ("no shots", "{fruit} --shots 0", ["'--shots'", "'0'", "at least 1"]),
    ("shots that are no number", "{fruit} --shots few", ["'--shots'", "'few'", "at least 1"]),
    ("all for testing", "{fruit} --test-fraction 1", ["'--test-fraction'", "'1'", "above 0 and below 1"]),
    ("no number", "{fruit} --test-fraction nan", ["'--test-fraction'", "'nan'", "above 0 and below 1"]),
]


@pytest.mark.parametrize(("data", "says"), [case[1:] for case in DATA], ids=[case[0] for case in DATA])
def test_data(kinprune: Cli, place: Path, fruit: Path, tmp_path: Path, data: str, says: list[str]) -> None:
    command = f"prune {data} --out {{out}} --image-size 32 --steps 0 {VIT} {HALF}"
    folders = {"place": place, "fruit": fruit, "out": tmp_path / "out"}
    message = refused(kinprune, command, folders, [tmp_path, place, fruit])
    assert all(part in message for part in says), message


PARQUET = [
    ("two image columns", "two-images.parquet", ["image column may be 'front', 'back'", "--image-column"]),
    ("two label columns", "two-labels.parquet", ["label column may be 'label', 'species'", "--label-column"]),
    ("no label column", "no-label.parquet", ["no label column", "'picture', 'thing'", "--label-column"]),
    ("unknown column", "no-label.parquet --label-column thin", ["no column 'thin'", "did you mean 'thing'"]),
    ("damaged", "damaged.parquet", ["damaged.parquet", "cannot be read as parquet"]),
]


@pytest.mark.parametrize(("data", "says"), [case[1:] for case in PARQUET], ids=[case[0] for case in PARQUET])
def test_parquet(kinprune: Cli, fruit: Path, tmp_path: Path, data: str, says: list[str]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = ("apple", "apple", "pear", "pear")
    images = [{"bytes": (fruit / name / "0000.png").read_bytes()} for name in names]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, columns in (
        ("two-images", {"front": images, "back": images, "label": names}),
        ("two-labels", {"image": images, "label": names, "species": names}),
        ("no-label", {"picture": images, "thing": names}),
    ):
        parquet.write_table(arrow.table(columns), folder / f"{name}.parquet")
    whole = (folder / "no-label.parquet").read_bytes()
    (folder / "damaged.parquet").write_bytes(whole[: len(whole) // 2])
    command = f"prune {{data}}/{data} --out {{out}} --image-size 32 --steps 0 {VIT} {HALF}"
    message = refused(kinprune, command, {"data": folder, "out": tmp_path / "out"}, [tmp_path])
    assert all(part in message for part in says), message


MODELS = [
    ("unknown name", "--model test_vitt --random", ["'test_vitt'", "Did you mean 'test_vit'"]),
    ("unknown tag", "--model test_vit.in99k --random", ["'in99k'", "'test_vit.r160_in1k'"]),
    ("a path", "--model {place}/vit.safetensors", ["vit.safetensors", "--weights"]),
    ("no such module", "--model no_such_module:f", ["'no_such_module'", "current folder"]),
    ("no such factory", "--model wrong_factories:build", ["has no 'build'", "'bilud'"]),
    ("no factory", "--model wrong_factories:number", ["'number'", "no callable"]),
    ("no module made", "--model wrong_factories:module_of_another_kind", ["returned dict", "torch.nn.Module"]),
    ("a factory that fails", "--model wrong_factories:fails", ["RuntimeError: no flux capacitor"]),
    ("no logits", "--model wrong_factories:no_logits", ["[1, classes]", "image classifier"]),
    ("imports what is not there", "--model wrong_import:f", ["'wrong_import'", "a_package_that_nobody_has"]),
    ("syntax error", "--model wrong_syntax:f", ["'wrong_syntax'", "SyntaxError"]),
    ("patches", "--model test_vit --random --image-size 40", ["40x40", "16x16", "32x32 or 48x48"]),
    ("too small", "--model test_resnet --random --image-size 16", ["16x16", "--image-size 32 or more"]),
    ("no size", "--model test_vit --random --image-size 0", ["'--image-size'", "'0'", "at least 1"]),
    ("a mean of two colours", "--model test_vit --random --mean 1,2", ["'--mean'", "'1,2'", "0.5,0.5,0.5"]),
    ("a deviation of 0", "--model test_vit --random --std 0,1,1", ["std is", "positive"]),
    ("no interpolation", "--model test_vit --random --interpolation soft", ["'soft'", "nearest, bilinear, bicubic"]),
    ("a crop over 1", "--model test_vit --random --crop-pct 3", ["crop_pct is 3.0", "up to 1"]),
    ("weights and random", "--model test_vit --weights {place}/vit.safetensors --random", ["leave out --random"]),
    ("no weights file", "--model test_vit --weights {place}/nowhere.safetensors", ["nowhere.safetensors does not"]),
    ("a pickle", "--model test_vit --weights {place}/vit.pth", ["vit.pth is a pickle", "save_file"]),
    ("no safetensors", "--model test_vit --weights {place}/text.safetensors", ["text.safetensors is no safetensors"]),
    ("cut short", "--model test_vit --weights {place}/cut.safetensors", ["cut.safetensors", "Fetch it again"]),
    ("another file type", "--model test_vit --weights {place}/fruit.zip", ["fruit.zip", ".safetensors"]),
    ("a folder", "--model test_vit --weights {place}", ["is a folder", ".safetensors"]),
    ("another model's", "--model test_vit --weights {place}/other.safetensors", ["other.safetensors", "test_vit"]),
    ("says another model", "--model test_vit --weights {place}/said.safetensors", ["'resnet50'", "another file"]),
    ("a missing tensor", "--model test_vit --weights {place}/missing.safetensors", ["missing.safetensors", "mlp.fc2"]),
    ("a wrong shape", "--model test_vit --weights {place}/shape.safetensors", ["mlp.fc1.weight", "7x64", "192x64"]),
    ("NaN", "--model test_vit --weights {place}/nan.safetensors", ["'norm.weight'", "NaN"]),
    ("no published weights", "--model test_coatnet", ["test_coatnet", "--weights", "--random"]),
]


@pytest.mark.parametrize(("model", "says"), [case[1:] for case in MODELS], ids=[case[0] for case in MODELS])
def test_model(
    kinprune: Cli,
    place: Path,
    fruit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    says: list[str],
) -> None:
    monkeypatch.chdir(place)
    size = "" if "--image-size" in model else "--image-size 32"
    command = f"prune {{fruit}} --out {{out}} {size} --steps 0 {HALF} {model}"
    message = refused(kinprune, command, {"place": place, "fruit": fruit, "out": tmp_path / "out"}, [tmp_path, place])
    assert all(part in message for part in says), message


def test_no_weights_and_no_network(kinprune: Cli, fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refused(
        kinprune, f"{PRUNE} --model test_vit {HALF}", {"fruit": fruit, "out": tmp_path / "out"}, [tmp_path]
    )
    assert "'test_vit'" in message and "--weights" in message and "--random" in message


OPTIONS = [
    ("no budget", "", ["no budget", "--keep 0.1", "--max-params"]),
    ("keep nothing", "--keep 0", ["'--keep'", "'0'", "at most 1"]),
    ("keep less than nothing", "--keep -0.1", ["'--keep'", "'-0.1'", "above 0"]),
    ("keep more than all", "--keep 1.5", ["'--keep'", "'1.5'", "at most 1"]),
    ("keep no number", "--keep half", ["'--keep'", "'half'", "0.1 or 10%"]),
    ("keep not a number", "--keep nan", ["'--keep'", "'nan'", "0.1 or 10%"]),
    ("params in words", "--max-params lots", ["'--max-params'", "'lots'", "1.5M or 30%"]),
    ("params in bytes", "--max-params 3MB", ["'--max-params'", "'3MB'", "1.5M or 30%"]),
    ("negative macs", "--max-macs -5M", ["'--max-macs'", "'-5M'", "above 0"]),
    ("no weights", "--max-weights 0", ["'--max-weights'", "'0'", "4MB"]),
    ("unknown unit", "--max-memory 3parsec", ["'--max-memory'", "'3parsec'", "KiB"]),
    ("too many", f"--max-params {'9' * 400}", ["'--max-params'", "1.5M or 30%"]),
    ("no per cent", "--max-params 0%", ["'--max-params'", "'0%'", "above 0"]),
    ("few params", "--max-params 1000", ["1,000 parameters", "still needs 1", "--stream"]),
    ("few macs", "--max-macs 1k", ["1,000 multiply-accumulates", "still needs 4"]),
    ("few bytes", "--max-weights 1%", ["bytes of weights", "still needs 4"]),
    ("little memory", "--max-memory 2KiB", ["2,048 bytes of peak memory", "still needs 3,"]),
    ("method", f"{HALF} --method taylr", ["method 'taylr'", "taylor", "synflow"]),
    ("allocation", f"{HALF} --allocation even", ["allocation 'even'", "layer, global"]),
    ("head", f"{HALF} --head svm", ["head 'svm'", "ridge, class-mean"]),
    ("optimiser", f"{HALF} --optimiser lion", ["optimiser", "'lion'", "sgd, adamw"]),
    ("negative steps", f"{HALF} --steps -1", ["'--steps'", "'-1'", "at least 0"]),
    ("steps in words", f"{HALF} --steps many", ["'--steps'", "'many'", "at least 0"]),
    ("no rounds", f"{HALF} --rounds 0", ["'--rounds'", "'0'", "at least 1"]),
    ("negative multiple", f"{HALF} --multiple -8", ["'--multiple'", "'-8'", "at least 1"]),
    ("no batch", f"{HALF} --batch-size 0", ["'--batch-size'", "'0'", "at least 1"]),
    ("no rate", f"{HALF} --learning-rate 0", ["'--learning-rate'", "'0'", "above 0"]),
    ("negative seed", f"{HALF} --seed -1", ["'--seed'", "'-1'", "at least 0"]),
    ("no threads", f"{HALF} --threads 0", ["'--threads'", "'0'", "at least 1"]),
    ("model", f"{HALF} --model test_vitt", ["'test_vitt'", "Did you mean 'test_vit'"]),
    ("no such device", f"{HALF} --device tpux", ["device 'tpux'", "cpu, cuda"]),
    ("a device of another kind", f"{HALF} --device meta", ["device 'meta'", "cpu, cuda"]),
    ("no such option", f"{HALF} --stepps 3", ["--stepps", "--steps"]),
]
BEFORE_THE_DATA = {case[0] for case in OPTIONS} - {"few params", "few macs", "few bytes", "little memory"}


@pytest.mark.parametrize(("name", "options", "says"), OPTIONS, ids=[case[0] for case in OPTIONS])
def test_options(
    kinprune: Cli, place: Path, fruit: Path, tmp_path: Path, name: str, options: str, says: list[str]
) -> None:
    """Options are refused before data are looked at; budgets, which need the model, before images are decoded."""
    data = "{place}/nowhere" if name in BEFORE_THE_DATA else "{place}/unreadable"
    command = f"prune {data} --out {{out}} {VIT} --image-size 32 {options}"
    message = refused(kinprune, command, {"place": place, "fruit": fruit, "out": tmp_path / "out"}, [tmp_path])
    assert all(part in message for part in says), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(kinprune: Cli, place: Path, fruit: Path, tmp_path: Path) -> None:
    message = refused(
        kinprune, f"{PRUNE} {VIT} {HALF} --device cuda", {"fruit": fruit, "out": tmp_path / "o"}, [tmp_path]
    )
    assert "'cuda'" in message and "--device cpu" in message
    message = refused(kinprune, "eval {place}/good {fruit} --device cuda:1", {"place": place, "fruit": fruit}, [place])
    assert "'cuda:1'" in message and "--device cpu" in message


def test_the_smallest_budget_named_is_reached(kinprune: Cli, fruit: Path, tmp_path: Path) -> None:
    folders = {"fruit": fruit, "out": tmp_path / "out"}
    message = refused(kinprune, f"{PRUNE} {VIT} --max-params 5", folders, [tmp_path])
    smallest = re.search(r"still needs ([\d,]+)", message)
    assert smallest is not None
    command = f"{PRUNE} {VIT} --json --max-params {smallest[1].replace(',', '')}"
    made = kinprune(*shlex.split(command.format(**folders)))
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["costs"]["parameters"] == int(smallest[1].replace(",", ""))


def make_out(kind: str, folder: Path, place: Path) -> Path:
    out = folder / "out"
    if kind == "a file":
        out.write_text("mine")
    elif kind == "not empty":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    elif kind in ("an artifact", "an artifact and more"):
        shutil.copytree(place / "good", out)
    elif kind == "below a file":
        (folder / "file").write_text("mine")
        out = folder / "file" / "out"
    if kind == "an artifact and more":
        (out / "thesis.txt").write_text("mine")
    return out


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("a file", "", ["is a file", "choose another path"]),
        ("not empty", "--overwrite", ["is no artifact", "empty directory"]),
        ("an artifact", "", ["already holds an artifact", "--overwrite"]),
        ("an artifact and more", "--overwrite", ["thesis.txt", "move that elsewhere"]),
        ("below a file", "", ["cannot be made", "choose another directory"]),
    ],
)
def test_out(kinprune: Cli, place: Path, tmp_path: Path, kind: str, options: str, says: list[str]) -> None:
    out = make_out(kind, tmp_path, place)
    # The data are not even looked at.
    command = f"prune {{place}}/nowhere --out {{out}} --image-size 32 --steps 0 {VIT} {HALF} {options}"
    message = refused(kinprune, command, {"place": place, "out": out}, [tmp_path])
    assert str(out) in message and all(part in message for part in says), message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_out_that_may_not_be_written(kinprune: Cli, place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    command = f"prune {{place}}/nowhere --out {{out}} {VIT} {HALF}"
    message = refused(kinprune, command, {"place": place, "out": folder / "out"}, [tmp_path])
    assert str(folder) in message and "may write to" in message


ARTIFACTS = [
    ("missing", "nowhere", ["nowhere is not there", "kinprune.json"]),
    ("a file", "fruit.zip", ["fruit.zip is a file", "kinprune.json"]),
    ("no artifact", "empty", ["kinprune.json cannot be read", "get the artifact again"]),
    ("weights cut short", "cut", ["model.safetensors has", "get the artifact again"]),
    ("weights altered", "flipped", ["model.safetensors is damaged or was altered", "get the artifact again"]),
    ("weights missing", "halved", ["model.safetensors cannot be read", "get the artifact again"]),
    ("description altered", "edited", ["kinprune.json was altered", "get the artifact again"]),
    ("description cut short", "garbled", ["kinprune.json is damaged", "get the artifact again"]),
    ("newer version", "newer", ["format 999", "newer Kinprune", "upgrade"]),
]


@pytest.mark.parametrize("command", ["eval {artifact} {fruit}", "predict {artifact} {fruit}", "export {artifact}"])
@pytest.mark.parametrize(("name", "says"), [case[1:] for case in ARTIFACTS], ids=[case[0] for case in ARTIFACTS])
def test_artifact(kinprune: Cli, place: Path, fruit: Path, command: str, name: str, says: list[str]) -> None:
    message = refused(kinprune, command, {"artifact": place / name, "fruit": fruit}, [place])
    assert all(part in message for part in says), message


USE = [
    ("eval of other classes", "eval {good} {place}/empty-class", ["'plum'", "add images"]),
    ("eval without a class", "eval {good} {place}/one-class", ["no class 'pear'"]),
    ("eval of no data", "eval {good} {place}/nowhere", ["nowhere does not exist"]),
    ("eval of unreadable images", "eval {good} {place}/no-images", ["no-images holds no images"]),
    ("eval in no batches", "eval {good} {fruit} --batch-size 0", ["'--batch-size'", "'0'", "at least 1"]),
    ("predict of no image", "predict {good} {place}/vit.pth", ["vit.pth cannot be read as an image"]),
    ("predict of a missing image", "predict {good} {place}/nowhere.png", ["nowhere.png", "No such file"]),
    ("predict of an empty folder", "predict {good} {place}/empty", ["no image in", "empty", "give image files"]),
    ("predict of a damaged image", "predict {good} {place}/unreadable", ["0002.png", "replace or remove"]),
    ("predict of nothing", "predict {good}", ["IMAGE"]),
    ("top none", "predict {good} {fruit} --top 0", ["'--top'", "'0'", "at least 1"]),
    ("export to another format", "export {good} --format tflite", ["'tflite'", "expected onnx"]),
    ("export to a missing folder", "export {good} --out {place}/nowhere/m.onnx", ["nowhere", "make it first"]),
    ("export to a folder", "export {good} --out {place}/folder.onnx", ["folder.onnx is a folder"]),
    ("export to another suffix", "export {good} --out {place}/m.tflite", ["m.tflite", ".onnx"]),
    ("export within nothing", "export {good} --tolerance 0", ["'--tolerance'", "'0'", "above 0"]),
    ("units of nothing", "units", ["MODEL"]),
    ("units of an unknown model", "units resnet81", ["'resnet81'", "Did you mean"]),
    ("units of no classes", "units test_vit --num-classes 0", ["'--num-classes'", "'0'", "at least 1"]),
    ("unknown command", "prun", ["'prun'", "prune"]),
]


@pytest.mark.parametrize(("command", "says"), [case[1:] for case in USE], ids=[case[0] for case in USE])
def test_use(kinprune: Cli, place: Path, fruit: Path, command: str, says: list[str]) -> None:
    (place / "folder.onnx").mkdir(exist_ok=True)
    message = refused(kinprune, command, {"good": place / "good", "place": place, "fruit": fruit}, [place])
    assert all(part in message for part in says), message
