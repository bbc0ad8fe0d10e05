"""A team's bank by its commands: records in PostgreSQL, weights on S3."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODEL = "--model test_resnet --random --image-size 32"
QUICK = "--rounds 1 --steps 1 --batch-size 8 --classes 2 --broad-steps 0"


def test_a_team_s_bank_from_its_making_to_a_model(
    kinprune: Callable[..., Any],
    fruit: Path,
    make_database: Callable[[], str],
    s3: Callable[[], str],
    s3_server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, store = make_database().replace("kinprune@", "kinprune:hunter2@") + "&password=hunter2", s3()

    def run(command: str) -> dict[str, Any]:
        result = kinprune(*shlex.split(command), "--json")
        assert result.exit_code == 0, result.output
        assert "hunter2" not in result.output
        return json.loads(result.stdout)

    bank = shlex.quote(address)
    built = run(f"bank build {fruit} --bank {bank} --store {store} {MODEL} {QUICK} --tasks 2")
    assert (built["added"], built["records"]) == (2, 2) and "kinprune:***@" in built["bank"]
    again = run(f"bank build {fruit} --bank {bank} {QUICK} --tasks 2")
    assert (again["added"], again["present"]) == (0, 2)
    info = run(f"bank info {bank}")
    assert info["store"] == store and info["records"] == 2 and info["bytes"]["backbone"] > 0
    assert [record["id"] for record in run(f"bank ls {bank}")["records"]] == [1, 2]
    assert len(run(f"kin {fruit} --bank {bank} --neighbours 2")["neighbours"]) == 2
    run(f"adapt {fruit} --bank {bank} --keep 0.5 --steps 0 --neighbours 2 --no-onnx --out {tmp_path / 'small'}")
    assert (tmp_path / "small" / "model.safetensors").is_file()
    assert run(f"bank verify {bank} --clean")["whole"]
    copy = tmp_path / "copy.db"
    run(f"bank merge {copy} {bank}")
    assert run(f"bank verify {copy}") | {"bank": ""} == run(f"bank verify {bank}") | {"bank": ""}

    monkeypatch.setattr("kinprune.bank.retrying.RETRY_SECONDS", 0.02)
    s3_server.stop()
    try:
        lost = kinprune(*shlex.split(f"bank verify {bank}"))
    finally:
        s3_server.start()
    assert lost.exit_code == 2 and f"the store {store} cannot be reached" in lost.stderr
    assert "run the same command again" in lost.stderr
    assert run(f"bank rm {bank} 1 --yes")["records"] == 1
