"""Every protocol of the study runs, made tiny, on a random backbone and pictures made here.

One runs all of its methods, the others a few of the test stage, which are the same: it is whether their banks, data
and backbones are found that is seen there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS = sorted(path.stem for path in (ROOT / "benchmarks" / "study" / "protocols").glob("*.json"))
MORE = ("ant", "bat", "cow", "dog", "elk", "fox")
SIZE = 32
WHOLE = "cnn-cifar"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_method_of_a_protocol_runs(
    name: str, make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install 'kinprune[dev]'")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.study.__main__ import main
    from benchmarks.study.protocol import read_protocol, smoke

    content = json.loads((ROOT / "benchmarks" / "study" / "protocols" / f"{name}.json").read_text())
    bank, targets = content["bank"], content["targets"]
    if name != WHOLE:
        content["parts"] = [part for part in content["parts"] if part["stage"] == "test"][:2]
        for part in content["parts"]:
            part["methods"] = part["methods"][:2]
    targets["data"] = [targets["data"]] if isinstance(targets["data"], str) else targets["data"][:2]
    for place, data in enumerate(sorted({bank["data"], *targets["data"]})):
        classes = (*bank["left_out"], *MORE) if data == bank["data"] else [f"{word}{place}" for word in MORE]
        make_folder(tmp_path / "data" / data, classes, 10, SIZE)
    bank["label_column"] = targets["label_column"] = None  # folders have none
    bank["image_size"] = SIZE
    (tmp_path / "weights").mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model(bank["model"]).state_dict(), tmp_path / "weights" / bank["weights"])
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(content))
    places = [word for folder in ("data", "weights", "banks") for word in (f"--{folder}", str(tmp_path / folder))]
    for stage in sorted({part["stage"] for part in content["parts"]}):
        rows = tmp_path / f"{stage}.jsonl"
        assert main([str(path), "--smoke", "--stage", stage, *places, "--out", str(rows)]) == 0
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        (part,) = [part for part in smoke(read_protocol(str(path))).parts if part.stage == stage]
        every = {(data, method) for data in targets["data"] for method in part.methods}
        assert {(row["data"], row["method"]) for row in found} == every and len(found) == len(every)
        assert {method for part in content["parts"] if part["stage"] == stage for method in part["methods"]} == {
            row["method"] for row in found
        }
