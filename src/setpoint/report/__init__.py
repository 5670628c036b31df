"""What a person reads: terminal tables, one self-contained HTML page, JSON, and the difference of two reports."""

from setpoint.report.difference import FindingChange, ReportDiff, StatisticChange, diff
from setpoint.report.report import SCHEMA_VERSION, ModelInfo, Report

__all__ = ["SCHEMA_VERSION", "FindingChange", "ModelInfo", "Report", "ReportDiff", "StatisticChange", "diff"]
