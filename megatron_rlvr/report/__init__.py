"""Report: what a run records while it trains; `megatron_rlvr.report.report` makes figures and pages of it.

That module is not imported here: a trainer rank has no use for matplotlib.
"""

from megatron_rlvr.report.recorder import RunRecorder
from megatron_rlvr.report.records import append_record, read_records

__all__ = ["RunRecorder", "append_record", "read_records"]
