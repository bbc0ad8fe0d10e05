"""The command line: ``kinprune``. Commands call the library and hold no logic of their own."""

from kinprune.cli.app import main

__all__ = ["main"]
