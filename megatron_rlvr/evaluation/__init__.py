"""How good and how varied a policy's answers are: avg@k, pass@k and distinct correct answers."""

from __future__ import annotations

from megatron_rlvr.evaluation.metrics import EvalMetrics, avg_at_k, distinct_correct, evaluate_answers, pass_at_k

__all__ = ["EvalMetrics", "avg_at_k", "distinct_correct", "evaluate_answers", "pass_at_k"]
