"""Error analysis of a model on one page: errors by type and cost, curves, calibration, the worst images."""

from a2fpn.report.facts import data_facts, model_facts
from a2fpn.report.page import Run, write_report

__all__ = ["Run", "data_facts", "model_facts", "write_report"]
