"""Draw a command's terminal output as an SVG picture.

python docs/images/make.py docs/images/prune.svg kinprune prune photos --model ... --out small
"""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> None:
    """Run the command given behind the picture's path and draw what it printed."""
    picture, command = Path(sys.argv[1]), sys.argv[2:]
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "88"}
    found = subprocess.run(
        command, check=True, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    console = Console(record=True, width=88, file=io.StringIO(), force_terminal=True)
    shown = [Path(part).name if os.sep in part else part for part in command]
    console.print(Text(f"$ {shlex.join(shown)}", style="bold"))
    console.print(Text.from_ansi(found.stdout))
    console.save_svg(str(picture), title="kinprune")


if __name__ == "__main__":
    main()
