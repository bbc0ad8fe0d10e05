"""Progress bars: on a terminal, on standard error, for what lasts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kinprune import progress
from kinprune.progress import track

pty = pytest.importorskip("pty", reason="terminals are made with pty, which this system lacks")
SOURCE = Path(progress.__file__).resolve().parents[1]
SCRIPT = """
import sys, time
from kinprune.progress import track
for step in track(4, "slow stage", {enabled}):
    time.sleep({pause})
    for inner in track([1, 2], "inner stage"):
        time.sleep({pause} / 2)
print("done", step)
"""


def run(pause: float, enabled: bool = True, **environment: str) -> tuple[str, str]:
    """What a script writes to standard output and, as a terminal, to standard error."""
    master, slave = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "TERM": "xterm", "COLUMNS": "100", **environment}
    command = [sys.executable, "-c", SCRIPT.format(pause=pause, enabled=enabled)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, env=env, check=True, text=True)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # how a closed terminal ends on Linux
        pass
    os.close(master)
    return done.stdout, shown.decode()


def test_what_lasts_is_shown_on_a_terminal() -> None:
    out, shown = run(0.3)
    assert out == "done 3\n"
    assert "slow stage" in shown and "4" in shown
    assert "inner stage" not in shown


@pytest.mark.parametrize(
    ("pause", "enabled", "term"), [(0.0, True, "xterm"), (0.3, False, "xterm"), (0.3, True, "dumb")]
)
def test_nothing_else_is_shown(pause: float, enabled: bool, term: str) -> None:
    assert run(pause, enabled, TERM=term) == ("done 3\n", "")


def test_no_terminal_no_bar() -> None:
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "FORCE_COLOR": "1"}
    command = [sys.executable, "-c", SCRIPT.format(pause=0.3, enabled=True)]
    done = subprocess.run(command, capture_output=True, env=env, check=True, text=True)
    assert (done.stdout, done.stderr) == ("done 3\n", "")


def test_the_steps_come_through() -> None:
    assert list(track(3, "counting")) == [0, 1, 2]
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert list(track((x for x in (1, 2)), "generated", total=2)) == [1, 2]
