"""Report: what a run records while it trains, and the figures and pages made of it."""

from megatron_rlvr.report.recorder import RunRecorder
from megatron_rlvr.report.records import append_record, read_records
from megatron_rlvr.report.report import load_run, write_report

__all__ = ["RunRecorder", "append_record", "load_run", "read_records", "write_report"]
