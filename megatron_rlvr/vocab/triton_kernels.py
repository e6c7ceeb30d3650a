r"""The two Triton kernels behind `megatron_rlvr.vocab.triton_rows`, each reading the logits once.

The arithmetic differs from the torch path in two ways:

* Blocks of columns are merged online. Whenever a block raises the maximum, its columns that attain it are taken out
  and counted, and what came before is shifted; so the sum without one of them never holds a 1 that swallows the rest.
* Exponents are in bits: e^u = 2^y with y = (z - max) log2(e) / tau. The factor is a pair of fp32 numbers and the
  rounding error of the product comes from a fused multiply-add, so a small probability is as exact as z - max is.
"""

from __future__ import annotations

import math

import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

_LN2 = tl.constexpr(math.log(2.0))
# log2(e) as a pair of fp32 numbers
_LOG2E = tl.constexpr(1.4426950216293335)
_LOG2E_TAIL = tl.constexpr(1.9259629911266175e-08)
# 2^y is 0 in fp32 and 0 times y is 0, where 0 * -inf would be NaN.
_LOWEST_BITS = tl.constexpr(-1500.0)
_LOWEST_NATS = tl.constexpr(-1000.0)


@triton.jit  # type: ignore[untyped-decorator]
def _power(gap: tl.tensor, rate: tl.tensor, rate_tail: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """``(y, 2^y)`` with ``y = gap * (rate + rate_tail)`` rounded, but not in the power."""
    bits = gap * rate
    excess = tl.fma(gap, -rate_tail, tl.fma(gap, -rate, bits))
    power = tl.exp2(bits)
    return bits, tl.fma(power, excess * -_LN2, power)


@triton.jit  # type: ignore[untyped-decorator]
def _raise_top(
    sums: tl.tuple,
    top: tl.tensor,
    ties: tl.tensor,
    new_top: tl.tensor,
    rate: tl.tensor,
    rate_tail: tl.tensor,
    first: tl.tensor,
    EXTRAS: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The sums about the higher maximum ``new_top``; the ``ties`` columns left out so far join the first lane."""
    rest, centred, second, square_rest, square_centred, square_second = sums
    bits, scale = _power(tl.maximum(top - new_top, _LOWEST_BITS / rate), rate, rate_tail)
    mass = rest + first * ties
    if EXTRAS:
        squared = scale * scale
        mass2 = square_rest + first * ties
        second = scale * (second + bits * (2.0 * centred + bits * mass))
        square_rest = squared * mass2
        square_second = squared * (square_second + bits * (2.0 * square_centred + bits * mass2))
        square_centred = squared * (square_centred + bits * mass2)
    return scale * mass, scale * (centred + bits * mass), second, square_rest, square_centred, square_second


@triton.jit  # type: ignore[untyped-decorator]
def _absorb(
    sums: tl.tuple,
    top: tl.tensor,
    ties: tl.tensor,
    logits: tl.tensor,
    rate: tl.tensor,
    rate_tail: tl.tensor,
    first: tl.tensor,
    EXTRAS: tl.constexpr,
) -> tuple[tuple[tl.tensor, ...], tl.tensor, tl.tensor]:
    """Merge a block of logits into the lanes' sums, the running maximum and the count of columns left out for it."""
    block_top = tl.max(logits, 0)
    if block_top > top:
        sums = _raise_top(sums, top, ties, block_top, rate, rate_tail, first, EXTRAS)
        top = block_top
        leads = logits == top
        ties = tl.sum(tl.where(leads, 1.0, 0.0), 0)
        logits = tl.where(leads, float("-inf"), logits)
    gap = logits - tl.where(top == float("-inf"), 0.0, top)
    gap = tl.maximum(gap, _LOWEST_BITS / rate, propagate_nan=tl.PropagateNan.ALL)
    bits, power = _power(gap, rate, rate_tail)
    rest, centred, second, square_rest, square_centred, square_second = sums
    weighted = bits * power
    rest += power
    centred += weighted
    if EXTRAS:
        squared = power * power
        second += bits * weighted
        square_rest += squared
        square_centred += bits * squared
        square_second += weighted * weighted
    return (rest, centred, second, square_rest, square_centred, square_second), top, ties


@triton.jit  # type: ignore[untyped-decorator]
def state_kernel(
    state: tl.tensor,
    logits: tl.tensor,
    columns: tl.tensor,
    temperatures: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    EXTRAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row: the row's state, with centred sums in bits until they are stored."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    tau = tl.load(temperatures + row).to(tl.float32)
    rate = _LOG2E / tau
    rate_tail = (tl.fma(-rate, tau, _LOG2E) + _LOG2E_TAIL) / tau
    lanes = tl.arange(0, BLOCK)
    first = tl.where(lanes == 0, 1.0, 0.0)
    zero = tl.zeros([BLOCK], tl.float32)
    sums = (zero, zero, zero, zero, zero, zero)
    top = tl.full([], float("-inf"), tl.float32)
    ties = tl.full([], 0.0, tl.float32)
    whole = width // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=3):
        block = tl.load(base + start + lanes).to(tl.float32)
        sums, top, ties = _absorb(sums, top, ties, block, rate, rate_tail, first, EXTRAS)
    if whole < width:
        block = tl.load(base + whole + lanes, mask=whole + lanes < width, other=float("-inf")).to(tl.float32)
        sums, top, ties = _absorb(sums, top, ties, block, rate, rate_tail, first, EXTRAS)
    rest, centred, second, square_rest, square_centred, square_second = sums
    mass = tl.sum(rest, 0)
    poison = tl.where((top == float("inf")) | (mass != mass), float("nan"), 0.0)
    column = tl.load(columns + row)
    own = (column >= 0) & (column < width)
    target = tl.load(base + tl.where(own, column, 0), mask=own, other=float("-inf")).to(tl.float32)
    state += row * (8 if EXTRAS else 4)
    tl.store(state, top + poison)
    tl.store(state + 1, mass + (ties - 1.0) + poison)
    tl.store(state + 2, tl.sum(centred, 0) * _LN2 + poison)
    tl.store(state + 3, target)
    if EXTRAS:
        tl.store(state + 4, tl.sum(second, 0) * (_LN2 * _LN2) + poison)
        tl.store(state + 5, tl.sum(square_rest, 0) + (ties - 1.0) + poison)
        tl.store(state + 6, tl.sum(square_centred, 0) * _LN2 + poison)
        tl.store(state + 7, tl.sum(square_second, 0) * (_LN2 * _LN2) + poison)


@triton.jit  # type: ignore[untyped-decorator]
def _expm1(x: tl.tensor) -> tl.tensor:
    """``e^x - 1`` for x <= 0; by its series above -1/2, where the subtraction would lose digits."""
    series = 1.0 + x / 9.0
    for step in tl.static_range(7):
        series = 1.0 + x * series / (8.0 - step)
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def _slopes(
    logits: tl.tensor,
    is_target: tl.tensor,
    top: tl.tensor,
    log_mass: tl.tensor,
    scale: tl.tensor,
    linear: tl.tensor,
    entropic: tl.tensor,
    entropy: tl.tensor,
    at_target: tl.tensor,
) -> tl.tensor:
    """The gradient of a block of logits: ``p (linear + entropic (log p + entropy))`` but at the target and at -inf."""
    logits = logits.to(tl.float32)
    logp = tl.maximum((logits - top) * scale - log_mass, _LOWEST_NATS, propagate_nan=tl.PropagateNan.ALL)
    slopes = tl.exp(logp) * (linear + entropic * (logp + entropy))
    slopes = tl.where(is_target, at_target, slopes)
    return tl.where(logits == float("-inf"), 0.0, slopes)


@triton.jit  # type: ignore[untyped-decorator]
def gradient_kernel(
    out: tl.tensor,
    logits: tl.tensor,
    columns: tl.tensor,
    temperatures: tl.tensor,
    tops: tl.tensor,
    log_masses: tl.tensor,
    entropies: tl.tensor,
    logprobs: tl.tensor,
    grad_logprobs: tl.tensor,
    grad_entropies: tl.tensor,
    width: tl.tensor,
    spans: tl.tensor,
    out_stride: tl.tensor,
    logits_stride: tl.tensor,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row and span of columns; it alone reads and writes them, so ``out`` may be ``logits``."""
    row = (tl.program_id(0) // spans).to(tl.int64)
    begin = tl.program_id(0) % spans * SPAN
    end = tl.minimum(begin + SPAN, width)
    logits += row * logits_stride
    out += row * out_stride
    top = tl.load(tops + row).to(tl.float32)
    log_mass = tl.load(log_masses + row).to(tl.float32)
    entropy = tl.load(entropies + row).to(tl.float32)
    logprob = tl.load(logprobs + row).to(tl.float32)
    scale = 1.0 / tl.load(temperatures + row).to(tl.float32)
    linear = -scale * tl.load(grad_logprobs + row).to(tl.float32)
    entropic = -scale * tl.load(grad_entropies + row).to(tl.float32)
    # 1 - p of a token that is almost certain is lost in a subtraction but not in expm1.
    at_target = linear * _expm1(logprob) + entropic * (logprob + entropy) * tl.exp(logprob)
    column = tl.load(columns + row)
    column = tl.where((column >= 0) & (column < width), column, -1).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in tl.range(begin, whole, BLOCK, num_stages=3):
        at = start + lanes
        slopes = _slopes(tl.load(logits + at), at == column, top, log_mass, scale, linear, entropic, entropy, at_target)
        tl.store(out + at, slopes.to(out.dtype.element_ty))
    if whole < end:
        at = whole + lanes
        inside = at < end
        block = tl.load(logits + at, mask=inside, other=float("-inf"))
        slopes = _slopes(block, at == column, top, log_mass, scale, linear, entropic, entropy, at_target)
        tl.store(out + at, slopes.to(out.dtype.element_ty), mask=inside)
