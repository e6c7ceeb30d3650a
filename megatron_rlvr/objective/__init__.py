"""From rewards to a loss, as pure functions of tensors.

The parts compose in one fixed order, because the sign of an advantage has to be settled before anything weighs it:

1. rewards become one advantage for each response (`ESTIMATORS`),
2. `whiten` over the global batch, if asked for,
3. a token rule of the entropy room may shape the advantages token by token,
4. the sign is decided: positive means A > 0, strictly,
5. weights multiply: of the sign (lambda on A > 0), of the token, of the mismatch between trainer and engine,
6. ratio and surrogate,
7. plus the divergence from the reference, plus KL-Cov's penalty, minus the entropy bonus,
8. times the factor of the aggregation (`token_scale`), summed; the global token count divides.
"""

from __future__ import annotations

from megatron_rlvr.objective.advantages import BINARY, ESTIMATORS, grpo_advantages, whiten
from megatron_rlvr.objective.aggregation import AGGREGATIONS, token_scale
from megatron_rlvr.objective.compose import BatchStats, actuated, compose, token_batch
from megatron_rlvr.objective.diagnosis import Cause, Diagnosis, diagnose
from megatron_rlvr.objective.inputs import LossInputs, LossOutputs, Metrics, Objective
from megatron_rlvr.objective.loss import policy_loss
from megatron_rlvr.objective.mismatch import MISMATCHES, MismatchSettings, mismatch
from megatron_rlvr.objective.outcomes import Outcomes
from megatron_rlvr.objective.settings import LossSettings, check_composition

__all__ = [
    "AGGREGATIONS",
    "BINARY",
    "ESTIMATORS",
    "MISMATCHES",
    "BatchStats",
    "Cause",
    "Diagnosis",
    "LossInputs",
    "LossOutputs",
    "LossSettings",
    "Metrics",
    "MismatchSettings",
    "Objective",
    "Outcomes",
    "actuated",
    "check_composition",
    "compose",
    "diagnose",
    "grpo_advantages",
    "mismatch",
    "policy_loss",
    "token_batch",
    "token_scale",
    "whiten",
]
