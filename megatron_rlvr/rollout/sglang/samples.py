"""What is asked of ``/generate`` for samples of one prompt, and what its reply must look like to become samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_rlvr.core import FinishReason, Sample, SamplingParams
from megatron_rlvr.rollout.engine import derive_seed

_FINISHED = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class UnusableReplyError(Exception):
    """A reply that must not become samples: aborted, incomplete, or made by other weights."""


def generate_payload(
    group: int, copies: range, prompt_ids: list[int], sampling: SamplingParams, eos_id: int
) -> dict[str, Any]:
    """The request for samples number ``copies`` of one prompt.

    Every sample is an entry of its own: with ``n`` they would share one seed, and a server with deterministic inference
    would draw the same response ``n`` times. Nothing truncates the distribution (see `SamplingParams`).
    """
    common = {
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "stop_token_ids": [eos_id],
    }
    each = [common | {"sampling_seed": derive_seed(sampling.seed, group, copy)} for copy in copies]
    if len(each) == 1:  # the one form that routers understand
        return {"input_ids": prompt_ids, "sampling_params": each[0], "return_logprob": True}
    return {"input_ids": [prompt_ids] * len(each), "sampling_params": each, "return_logprob": True}


def read_samples(
    replies: Sequence[dict[str, Any]],
    group: int,
    prompt_ids: list[int],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Sample]:
    """The ``count`` samples of prompt ``group``.

    Raises:
        UnusableReplyError: If one is missing, was aborted, or lacks tokens, log-probs or the version of its weights.
    """
    if len(replies) != count:
        raise UnusableReplyError(f"{len(replies)} samples instead of {count}")
    try:
        return [_sample(reply, group, prompt_ids, tokenizer) for reply in replies]
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableReplyError(f"a sample without what was asked for ({type(error).__name__}: {error})") from error


def _sample(reply: dict[str, Any], group: int, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Sample:
    meta = reply["meta_info"]
    ids: list[int] = reply["output_ids"]
    reason = meta["finish_reason"]
    if reason is None or reason["type"] not in _FINISHED:
        raise UnusableReplyError(f"a sample was not finished ({reason})")
    logprobs = [float(logprob) for logprob, _, _ in meta["output_token_logprobs"]]
    if not ids or [token for _, token, _ in meta["output_token_logprobs"]] != ids:
        raise UnusableReplyError(f"{len(ids)} tokens with the log-probs of {len(logprobs)}, or of others")
    spans = _version_spans(meta, len(ids))
    return Sample(
        group=group,
        prompt_ids=prompt_ids,
        response_ids=ids,
        logprobs=logprobs,
        text=str(tokenizer.decode(ids, skip_special_tokens=True)),
        finish_reason=_FINISHED[reason["type"]],
        weight_version=min(version for version, _, _ in spans),
        version_spans=spans,
    )


def _version_spans(meta: dict[str, Any], length: int) -> list[tuple[int, int, int]]:
    """Which version made which tokens; SGLang before 0.5.20 names only the one at the end."""
    reported = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": length}]
    spans = [(int(span["version"]), int(span["start"]), int(span["end"])) for span in reported]
    ends = [0, *(end for _, _, end in spans)]
    if [start for _, start, _ in spans] != ends[:-1] or ends[-1] != length:
        raise UnusableReplyError(f"weight versions {spans} do not cover {length} tokens")
    return spans
