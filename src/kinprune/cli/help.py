"""Help of commands with many options: in sections, in plain text that fits a narrow terminal."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from kinprune.cli.options import SECTIONS


class Sectioned(TyperCommand):
    """A command whose ``--help`` has a section for each ``rich_help_panel`` of its options."""

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write arguments first, then the sections in order."""
        arguments, others = "Arguments", "Help"
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in (arguments, *SECTIONS, others)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            name, text = record
            if parameter.param_type_name == "argument":
                sections[arguments].append((name.partition(" ")[0], text))
            else:
                sections[getattr(parameter, "rich_help_panel", None) or others].append((name, text))
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
