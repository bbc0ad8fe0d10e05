"""The probes of many records as a bank stores them: in half precision, side by side, and decoded only where asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Row

from kinprune.bank.coding import decode_probe, decode_probes
from kinprune.bank.rows import check_probe
from kinprune.calibration import Probe
from kinprune.transferability import Sources

Places = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ProbeChunk:
    """The probes of some records: ``ids`` and numbers of classes, ``counts``, int64 ``[n]``, ``keys`` beside them."""

    ids: Places
    keys: tuple[str, ...]
    counts: Places
    contents: tuple[bytes, ...]
    features: int

    @classmethod
    def of(cls, rows: Sequence[Row[Any]], features: int) -> ProbeChunk:
        """From rows of the table of probes; BankError where one was altered."""
        for row in rows:
            check_probe(row, features)
        return cls(
            np.array([row.record for row in rows], dtype=np.int64),
            tuple(row.key for row in rows),
            np.array([row.classes for row in rows], dtype=np.int64),
            tuple(row.content for row in rows),
            features,
        )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def probes(self) -> tuple[Probe, ...]:
        """Each by itself, in single precision."""
        rows = zip(self.contents, self.counts.tolist(), strict=True)
        return tuple(decode_probe(content, classes, self.features) for content, classes in rows)

    def by_classes(self, places: Places) -> Iterator[tuple[Places, Sources]]:
        """Those of some places that have the same number of classes, together and in the order given, unpadded."""
        for classes in np.unique(self.counts[places]).tolist():
            those = places[self.counts[places] == classes]
            arrays = decode_probes([self.contents[place] for place in those.tolist()], classes, self.features)
            yield those, Sources(*arrays, self.counts[those])
