"""Help of commands with many options: in sections, in plain text that fits a narrow terminal."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand


class Sectioned(TyperCommand):
    """A command whose ``--help`` has a section for each of its options' ``rich_help_panel``."""

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the sections in the order of their first options; those without one come last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        others: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panel = getattr(parameter, "rich_help_panel", None)
                title = "Arguments" if parameter.param_type_name == "argument" else panel
                (others if title is None else sections.setdefault(title, [])).append(record)
        for title, records in [*sections.items(), ("Other options", others)]:
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
