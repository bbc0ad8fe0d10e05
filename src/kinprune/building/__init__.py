"""Filling a bank: source tasks are drawn, each is pruned from scratch on one of many workers, and recorded once."""

from kinprune.building.cluster import Cluster
from kinprune.building.filling import Build, Done, Watch, build
from kinprune.building.sources import BROAD_IMAGES, BROAD_TIMES, SOURCE_PLAN, Source, broaden, sample_sources
from kinprune.building.work import key_of, record_of

__all__ = [
    "BROAD_IMAGES",
    "BROAD_TIMES",
    "SOURCE_PLAN",
    "Build",
    "Cluster",
    "Done",
    "Source",
    "Watch",
    "broaden",
    "build",
    "key_of",
    "record_of",
    "sample_sources",
]
