"""The report of an adaptation: one HTML file that a person reads, with nothing outside it."""

from __future__ import annotations

from kinprune.report.inputs import ReportError, Tried
from kinprune.report.page import render_report, write_report

__all__ = ["ReportError", "Tried", "render_report", "write_report"]
