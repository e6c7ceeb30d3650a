r"""The row passes over a chunk of logits in Triton; see `megatron_rlvr.vocab.triton_kernels` for how.

Importing this module needs Triton, so only a caller that has chosen it does. Shapes, columns and the empty state are
those of `megatron_rlvr.vocab.state`; statistics are fp32. Block sizes come from plain tables: `triton.autotune` would
run the gradient kernel repeatedly on its own input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-not-found]

from megatron_rlvr.vocab.triton_kernels import gradient_kernel, state_kernel


class Launch(NamedTuple):
    """Columns per step of a program and warps per program."""

    block: int
    warps: int


# The last entry serves every width. Sums live in registers, one per column of a block, so extras take narrower blocks.
STATE_LAUNCHES = {False: (Launch(1024, 4), Launch(4096, 8)), True: (Launch(1024, 4), Launch(2048, 8))}
GRADIENT_LAUNCHES = (Launch(1024, 4), Launch(2048, 8))
# Blocks per program of the gradient: enough to share the row's numbers, few enough for programs to outnumber the SMs.
SPAN = 4
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shard_state(
    logits_TV: torch.Tensor, columns_T: torch.Tensor, temperature_T: torch.Tensor, extras: bool
) -> torch.Tensor:
    """Reduce a shard of logits to its row states in one pass.

    Args:
        logits_TV: bf16, fp16 or fp32 with adjacent columns; rows may lie apart. ``V`` and ``T`` may be 0.
        columns_T: Column of each row's target in this shard, int64; outside ``[0, V)`` when another shard owns it.
        temperature_T: Temperature of each row, positive.
        extras: Whether to add the four sums of `megatron_rlvr.vocab.state.Moments`.

    Returns:
        ``[T, 4]`` or ``[T, 8]`` fp32, columns as in `megatron_rlvr.vocab.state.unpack`. Rows with a NaN or ``+inf``
        logit are NaN but for the target's logit.

    Raises:
        ValueError: If the logits have another dtype or columns that are not adjacent.
    """
    _check(logits_TV)
    rows, width = logits_TV.shape
    state_TK = torch.empty(rows, 8 if extras else 4, dtype=torch.float32, device=logits_TV.device)
    if rows > 0:
        launch = _pick(STATE_LAUNCHES[extras], width)
        with torch.cuda.device_of(logits_TV):  # type: ignore[no-untyped-call]
            state_kernel[(rows,)](
                state_TK,
                logits_TV,
                columns_T.contiguous(),
                temperature_T.contiguous(),
                width,
                logits_TV.stride(0),
                EXTRAS=extras,
                BLOCK=launch.block,
                num_warps=launch.warps,
            )
    return state_TK


def write_gradient_(
    out_TV: torch.Tensor,
    logits_TV: torch.Tensor,
    columns_T: torch.Tensor,
    temperature_T: torch.Tensor,
    max_T: torch.Tensor,
    log_mass_T: torch.Tensor,
    entropy_T: torch.Tensor,
    logprob_T: torch.Tensor,
    grad_logprob_T: torch.Tensor,
    grad_entropy_T: torch.Tensor,
) -> None:
    r"""Write the gradient in the raw logits of ``sum(g * log p(target) + h * entropy)``.

    With g and h the upstream gradients, y the target's column and H the entropy, all of the whole row:

        tau * out_j = g ([j = y] - p_j) - h p_j (log p_j + H)

    Columns whose logit is ``-inf`` get 0.

    Args:
        out_TV: Where to write, bf16, fp16 or fp32; may be ``logits_TV`` itself, but not overlap it otherwise.
        logits_TV: As in `shard_state`.
        columns_T: As in `shard_state`.
        temperature_T: As in `shard_state`.
        max_T: Largest logit of the row over all shards.
        log_mass_T: log of the sum of e^((z - max) / tau) over all shards.
        entropy_T: H.
        logprob_T: Log-probability of the target.
        grad_logprob_T: g; 0 where the log-probability is ``-inf``.
        grad_entropy_T: h.

    Raises:
        ValueError: If a dtype is not one of the three, columns are not adjacent or the shapes differ.
    """
    _check(logits_TV)
    _check(out_TV)
    if out_TV.shape != logits_TV.shape:
        raise ValueError(f"the gradient {list(out_TV.shape)} must have the shape of the logits {list(logits_TV.shape)}")
    rows, width = logits_TV.shape
    if rows == 0 or width == 0:
        return
    per_row = (temperature_T, max_T, log_mass_T, entropy_T, logprob_T, grad_logprob_T, grad_entropy_T)
    launch = _pick(GRADIENT_LAUNCHES, width)
    span = SPAN * launch.block
    spans = triton.cdiv(width, span)
    with torch.cuda.device_of(logits_TV):  # type: ignore[no-untyped-call]
        gradient_kernel[(rows * spans,)](
            out_TV,
            logits_TV,
            columns_T.contiguous(),
            *(value_T.contiguous() for value_T in per_row),
            width,
            spans,
            out_TV.stride(0),
            logits_TV.stride(0),
            SPAN=span,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )


def _check(matrix_TV: torch.Tensor) -> None:
    if matrix_TV.dtype not in LOGIT_DTYPES:
        raise ValueError(f"the Triton kernels take bf16, fp16 or fp32, got {matrix_TV.dtype}; use backend='torch'")
    if matrix_TV.shape[1] > 1 and matrix_TV.stride(1) != 1:
        raise ValueError(f"the Triton kernels need adjacent columns, got strides {matrix_TV.stride()}")


def _pick(launches: tuple[Launch, ...], width: int) -> Launch:
    return next((launch for launch in launches if width <= launch.block), launches[-1])
