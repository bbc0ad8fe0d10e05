"""Several processes that write one bank at the same time: ``writers.py ADDRESS PROCESSES RECORDS``, a line each.

Every process claims some keys and adds all the records, each in an order of its own, and prints the numbers of those
that it was first with.
"""

from __future__ import annotations

import multiprocessing
import random
import sys

from tiny_net import random_record

from kinprune.backbones import load_backbone
from kinprune.bank import Record, open_bank
from kinprune.bank.claims import claim
from kinprune.units import find_units


def make_records(count: int) -> list[Record]:
    """The records of the first seeds."""
    backbone = load_backbone("tiny_net:tiny", num_classes=3, image_size=16)
    space = find_units(backbone.model, backbone.preprocessing.image_size, head=backbone.head)
    return [random_record(backbone, space, seed) for seed in range(count)]


def write(address: str, process: int, records: list[Record], start: multiprocessing.synchronize.Barrier) -> None:
    """Claim keys, add all records, and say which were this process's."""
    bank = open_bank(address)
    order = list(enumerate(records))
    random.Random(process % 2).shuffle(order)  # two processes each collide at every record
    start.wait(60)
    mine = [number for number, _ in order if claim(bank, f"claim {number}", f"process {process}", 600) == "yes"]
    print(" ".join(["claimed", *map(str, mine)]), flush=True)
    print(" ".join(["added", *(str(seed) for seed, record in order if bank.add(record))]), flush=True)


if __name__ == "__main__":
    place, processes, made = sys.argv[1], int(sys.argv[2]), make_records(int(sys.argv[3]))
    context = multiprocessing.get_context("fork")  # the libraries are loaded once
    barrier = context.Barrier(processes)
    running = [context.Process(target=write, args=(place, number, made, barrier)) for number in range(processes)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    sys.exit(any(one.exitcode for one in running))
