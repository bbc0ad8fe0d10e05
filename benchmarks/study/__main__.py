"""Run a protocol of the study, or write its tables.

    python -m benchmarks.study PROTOCOL --data DIR --weights DIR --banks DIR [--stage validation|test] [--smoke]

Every finished run is a line of ``benchmarks/results/study/PROTOCOL.jsonl``; run again, after Ctrl-C or ``kill -9``
too, it goes on where it stopped. ``--share 1/2`` and ``--share 2/2`` do half of the target tasks each, for two
processes. The protocol's bank is built first if it is not there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.study.costs import write_bank_costs
from benchmarks.study.protocol import STAGES, read_protocol, smoke, with_sources
from benchmarks.study.running import Places, Row, open_or_build, read_rows, run_protocol
from benchmarks.study.tables import page
from kinprune.errors import KinpruneError

RESULTS = Path(__file__).parents[1] / "results" / "study"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the tables; 2 where what was asked for cannot be done, 130 after Ctrl-C."""
    options = _options(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, run it again to go on", file=sys.stderr)
        return 130
    except (ValueError, KinpruneError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    protocol = read_protocol(options.protocol)
    protocol = with_sources(protocol, options.tasks) if options.tasks else protocol
    protocol = smoke(protocol) if options.smoke else protocol
    # What a smoke run gives says nothing: it is no result.
    rows = options.out or (options.banks if options.smoke else RESULTS) / f"{protocol.name}.jsonl"
    places = Places(options.data, options.weights, options.banks, rows)
    bank = open_or_build(protocol, places, options.workers)
    write_bank_costs(bank, rows.with_suffix(".bank.json"))

    def show(row: Row, number: int, of: int) -> None:
        found = ", ".join(f"{steps}: {value:.1%}" for steps, value in row["accuracy"].items())
        minutes = (time.perf_counter() - started) / 60
        left = minutes / number * (of - number)
        line = f"{number}/{of} {row['method']} on {', '.join(row['classes'])}: {found} (about {left:.0f} min left)"
        print(line, file=sys.stderr, flush=True)

    made = run_protocol(protocol, bank, places, options.stage, options.share, show)
    every = read_rows(rows)
    rows.with_suffix(".md").write_text(page(every))
    summary = {"protocol": protocol.name, "runs": made, "rows": len(every), "table": str(rows.with_suffix(".md"))}
    print(json.dumps({**summary, "seconds": round(time.perf_counter() - started, 1)}))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", help="a file of benchmarks/study/protocols, without .json")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--weights", type=Path, required=True, help="the folder of the backbones' weights")
    parser.add_argument("--banks", type=Path, required=True, help="where banks are, or are to be made")
    parser.add_argument("--stage", choices=STAGES, default="validation")
    parser.add_argument("--share", type=_share, default=(0, 1), metavar="I/N", help="every N-th target task")
    parser.add_argument("--workers", type=int, default=1, help="processes that build the bank")
    parser.add_argument("--tasks", type=int, help="narrow source tasks of the bank, not the protocol's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="the same made tiny: see that all of it runs")
    parser.add_argument("--out", type=Path, help="the file of rows")
    return parser.parse_args(arguments)


def _share(text: str) -> tuple[int, int]:
    place, _, of = text.partition("/")
    if not (place.isdigit() and of.isdigit() and 1 <= int(place) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share, expected one such as 1/2")
    return int(place) - 1, int(of)


if __name__ == "__main__":
    sys.exit(main())
