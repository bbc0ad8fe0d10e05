"""Artifacts: a pruned model on disk, rebuilt without tracing, without pickle and without the original weights."""

from kinprune.artifact.contents import Artifact
from kinprune.artifact.description import FORMAT
from kinprune.artifact.storage import check_destination, load, save

__all__ = ["FORMAT", "Artifact", "check_destination", "load", "save"]
