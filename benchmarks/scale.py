"""Seconds and memory against the size of a bank, from a thousand records to a million: opened, ranked, voted, listed.

    python benchmarks/scale.py --folder DIR [--tasks 1000 10000 100000 1000000] [--json]

The banks are made up, in the shape of real ones: five classes, 512 features, the 1,920 filters inside ResNet-18's
blocks; a million take 21 GB in DIR. They stay there, so that a second run measures at once. Every measurement is a
process of its own. Linux only: memory is read from /proc, and files are taken out of the system's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kin import COUNT, World
from scale_bank import fill, make_bank

from kinprune.bank import Bank, open_bank
from kinprune.bank.backbone import bank_space, load_bank_backbone
from kinprune.cli.bank import info_command, ls_command
from kinprune.delivery import versions
from kinprune.kin import Search, find_kin
from kinprune.transferability import Target, transferability
from kinprune.voting import ballot_smsp, neighbour_weights

RESULTS = Path(__file__).parent / "results"
IMAGES = 500
"""Images of a target."""

Parts = Mapping[str, Callable[[], object]]


def main(words: Sequence[str] | None = None) -> None:
    """Make the banks that are not there yet, measure each, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the banks are, or are made")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the fastest counts")
    parser.add_argument("--targets", type=int, default=3, help="targets that recall is counted over")
    parser.add_argument("--threads", type=int, default=1, help="threads of matrix products; one more reads")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--measure", metavar="NAME", help="one measurement of one bank: used by the above")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    if options.measure:
        bank = open_bank(options.folder / f"bank-{options.tasks[0]}.db")
        print(json.dumps(MEASURES[options.measure](bank, options)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = [measure_bank(tasks, options) for tasks in options.tasks]
    found = {"threads": options.threads, "versions": versions(), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(found))
    draw(rows, options.out.with_suffix(".svg"))
    if not options.json:
        print(page(found))
    largest = max(rows, key=lambda row: row["tasks"])
    print(json.dumps({name: largest[name]["seconds"] for name in ("nearest", "vote", "ls")}))


def measure_bank(tasks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one size."""
    path = options.folder / f"bank-{tasks}.db"
    made = path.with_suffix(".json")
    if not made.exists():
        bank = make_bank(path)
        seconds = fill(bank, World(bank.header.features), tasks)
        bank.close()
        made.write_text(json.dumps({"seconds": seconds}))
    row: dict[str, Any] = {
        "tasks": tasks,
        "bytes": path.stat().st_size,
        "made": json.loads(made.read_text())["seconds"],
        "load": os.getloadavg()[0],
        "repeats": options.repeats,
        "targets": options.targets,
    }
    for name in MEASURES:
        sketches = path.with_name(f"{path.name}.sketches")
        if name == "first":
            shutil.rmtree(sketches, ignore_errors=True)
        if name in ("first", "cold"):
            for file in (path, *sketches.glob("*")):
                forget(file)
        command = [sys.executable, __file__, "--folder", str(options.folder), "--tasks", str(tasks), "--measure", name]
        counts = ("repeats", "targets", "threads")
        words = [word for count in counts for word in (f"--{count}", str(getattr(options, count)))]
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(options.threads))
        environment = {**os.environ, **limits}
        done = subprocess.run([*command, *words], check=True, stdout=subprocess.PIPE, text=True, env=environment)
        row[name] = json.loads(done.stdout.splitlines()[-1])
        if not options.json:
            print(tasks, name, row[name], flush=True)
    return row


def forget(path: Path) -> None:
    """Let the system drop a file from its cache, so that it is read from the disk again."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def target_of(bank: Bank, seed: int = 0) -> Target:
    """A task of the world that the bank's probes are of."""
    return World(bank.header.features).target(IMAGES, seed)


def measured(run: Callable[[], object], repeats: int = 1) -> dict[str, float]:
    """Wall and processor seconds of the fastest run, and the resident memory that all took beyond what was there."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    best = {"seconds": np.inf, "processor": np.inf}
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        run()
        seconds = {"seconds": time.perf_counter() - started, "processor": time.process_time() - used}
        best = min(best, seconds, key=lambda each: each["seconds"])
    return {**best, "peak_bytes": max(0, _status("VmHWM") - before)}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measure_open(bank: Bank, options: argparse.Namespace) -> dict[str, float]:
    return measured(lambda: open_bank(bank.address).close(), options.repeats)


def measure_count(bank: Bank, options: argparse.Namespace) -> dict[str, float]:
    return measured(lambda: len(bank), options.repeats)


def measure_all(bank: Bank, options: argparse.Namespace) -> dict[str, float]:
    """Another measure, for which every probe is read."""
    target = target_of(bank)
    return measured(lambda: find_kin(bank, target, (), Search("nce")), options.repeats)


def measure_cold(bank: Bank, options: argparse.Namespace) -> dict[str, float]:
    target = target_of(bank)
    return measured(lambda: find_kin(bank, target, ()))


def measure_nearest(bank: Bank, options: argparse.Namespace) -> dict[str, float]:
    target = target_of(bank)
    return measured(lambda: find_kin(bank, target, ()), options.repeats + 1)  # one to fill the cache


def measure_random(bank: Bank, options: argparse.Namespace) -> dict[str, float]:
    target = target_of(bank)
    return measured(lambda: find_kin(bank, target, (), Search(which="random")), options.repeats)


def measure_vote(bank: Bank, options: argparse.Namespace) -> dict[str, float]:
    """Ten records from all over the bank: what they learnt is read, and becomes one score mask."""
    space = bank_space(bank, load_bank_backbone(bank, 2))
    ids = np.linspace(1, len(bank), COUNT).astype(int).tolist()
    weights = neighbour_weights(np.linspace(0, 1, COUNT))

    def vote() -> None:
        lessons = bank.lessons(ids)
        ballot_smsp(space, lessons.kept, lessons.scores, weights)

    return measured(vote, options.repeats)


def measure_ls(bank: Bank, options: argparse.Namespace) -> dict[str, float]:
    return measured(lambda: _silent(lambda: ls_command(bank=bank.address, json=True)), options.repeats)


def measure_info(bank: Bank, options: argparse.Namespace) -> dict[str, float]:
    return measured(lambda: _silent(lambda: info_command(bank=bank.address, json=True)), options.repeats)


def _silent(run: Callable[[], object]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        run()


def measure_recall(bank: Bank, options: argparse.Namespace) -> dict[str, float]:
    """The share of the truly nearest ten that are found, over all targets and of the worst."""
    targets = [target_of(bank, seed) for seed in range(options.targets)]
    best: list[list[tuple[float, str]]] = [[] for _ in targets]
    for chunk in bank.probes():
        for places, sources in chunk.by_classes(np.arange(len(chunk))):
            for target, top in zip(targets, best, strict=True):
                scores = transferability("leep", target, sources)
                those = np.argsort(-scores)[:COUNT]
                top += [(-scores[place], chunk.keys[places[place]]) for place in those]
                top[:] = sorted(top)[:COUNT]
    shares = []
    for target, top in zip(targets, best, strict=True):
        found = {neighbour.entry.key for neighbour in find_kin(bank, target, (), Search(count=COUNT))}
        shares.append(len(found & {key for _, key in top}) / len(top))
    return {"mean": float(np.mean(shares)), "worst": min(shares)}


MEASURES: dict[str, Callable[[Bank, argparse.Namespace], dict[str, float]]] = {
    "open": measure_open,
    "count": measure_count,
    "first": measure_cold,
    "cold": measure_cold,
    "nearest": measure_nearest,
    "all": measure_all,
    "random": measure_random,
    "vote": measure_vote,
    "ls": measure_ls,
    "info": measure_info,
    "recall": measure_recall,
}

COLUMNS = {
    "open": "open",
    "count": "count",
    "first": "nearest 10, first time",
    "cold": "nearest 10, from disk",
    "nearest": "nearest 10",
    "all": "nearest 10, NCE",
    "random": "random 10",
    "vote": "vote of 10",
    "ls": "`bank ls`",
    "info": "`bank info`",
}


def page(found: dict[str, Any]) -> str:
    """The table of seconds, that of memory, and what the banks took."""
    rows, names = found["rows"], list(COLUMNS)
    head = "| records | " + " | ".join(COLUMNS.values()) + " |"
    line = "|" + "---:|" * (len(names) + 1)

    def table(cell: Callable[[dict[str, Any]], str]) -> list[str]:
        cells = [" | ".join(cell(row[name]) for name in names) for row in rows]
        return [head, line, *(f"| {row['tasks']:,} | {cell} |" for row, cell in zip(rows, cells, strict=True)), ""]

    return "\n".join(
        [
            "# The size of a bank",
            "",
            "Made by `python benchmarks/scale.py --folder DIR`: made-up records of ResNet-18's shape, a process a",
            "number, the fastest of some runs (of the two without a cache, one). Threads for products:",
            f"{found['threads']}, and one that reads. The machine was busy with other work, as its load tells.",
            "",
            "*First time* nothing is in the system's cache and there are no sketches: the whole bank is read, and they",
            "are made (from 16,384 records on). *From disk* nothing is in the cache. The others find the bank in the",
            "cache, as far as it fits. NCE has no sketches: every probe is read.",
            "",
            "Seconds, and processor seconds in brackets:",
            "",
            *table(lambda cell: f"{_short(cell['seconds'])} ({_short(cell['processor'])})"),
            "Megabytes that the process grew by at most:",
            "",
            *table(lambda cell: f"{cell['peak_bytes'] / 1e6:.0f}"),
            "The banks, and the share of the truly nearest ten that is found:",
            "",
            "| records | bytes | bytes a record | seconds to write | targets | found, mean | worst | runs | load |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
            *(
                f"| {row['tasks']:,} | {row['bytes'] / 1e9:.2f} GB | {row['bytes'] / row['tasks']:,.0f} | "
                f"{row['made']:.0f} | {row['targets']} | {row['recall']['mean']:.3f} | {row['recall']['worst']:.1f} | "
                f"{row['repeats']} | {row['load']:.1f} |"
                for row in rows
            ),
            "",
        ]
    )


def _short(seconds: float) -> str:
    return f"{seconds:.4f}" if seconds < 0.01 else f"{seconds:.3f}" if seconds < 1 else f"{seconds:.1f}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds and memory against the number of records, both logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    style = {
        **{"svg.fonttype": "none", "svg.hashsalt": "kinprune", "font.size": 9, "font.family": "sans-serif"},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25},
    }
    colours = {"first": "#8d99ae", "all": "#d1495b", "nearest": "#0b6e4f", "info": "#edae49", "ls": "#7a5195"}
    colours |= {"vote": "#30638e"}
    across = [row["tasks"] for row in rows]
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.2), layout="constrained")
        for name, colour in colours.items():
            look = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.4}
            left.plot(across, [row[name]["seconds"] for row in rows], label=COLUMNS[name].replace("`", ""), **look)
            right.plot(across, [max(row[name]["peak_bytes"], 1e5) / 1e6 for row in rows], **look)
        right.plot(across, [row["bytes"] / 1e6 for row in rows], color="#333", linestyle=":", label="the bank itself")
        left.set(xscale="log", yscale="log", xlabel="records", ylabel="seconds")
        right.set(xscale="log", yscale="log", xlabel="records", ylabel="MB")
        for panel in (left, right):
            panel.minorticks_off()
        left.legend(frameon=False, fontsize=7.5)
        right.legend(frameon=False, fontsize=7.5)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
