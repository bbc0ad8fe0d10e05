"""Make the stored bank of a schema, for the tests that open what an earlier version wrote.

    python tests/data/make_bank.py tests/data/bank_0002

Run once for each schema, when it is new, and keep what it made: never make an old one again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_net import random_record

from kinprune.backbones import load_backbone
from kinprune.bank import create_bank, verify
from kinprune.bank.claims import claim
from kinprune.units import find_units


def make(folder: Path) -> None:
    """A bank of three records, one removed, one more claimed for a second, in ``folder / "bank.db"``."""
    folder.mkdir()
    backbone = load_backbone("tiny_net:tiny", num_classes=3, image_size=16)
    space = find_units(backbone.model, backbone.preprocessing.image_size, head=backbone.head)
    bank = create_bank(folder / "bank.db", backbone, space)
    for seed in range(4):
        bank.add(random_record(backbone, space, seed))
    bank.remove([2])
    assert claim(bank, "a key", "a builder", 1) == "yes"
    assert verify(bank).whole
    bank.close()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
