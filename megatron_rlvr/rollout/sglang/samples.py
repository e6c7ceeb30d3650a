"""What is asked of ``/generate`` for samples of one prompt, and what its reply must look like to become samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_rlvr.core import FinishReason, RLVRError, Sample, SamplingParams
from megatron_rlvr.rollout.engine import derive_seed

_FINISHED = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class UnusableReplyError(Exception):
    """A reply that must not become samples: aborted, incomplete, or made by other weights."""


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[list[int]]:
    """Token ids of every prompt, all below ``vocabulary``.

    Raises:
        RLVRError: If a prompt has no tokens, or one that the model does not have.
    """
    encoded: list[list[int]] = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    for position, ids in enumerate(encoded):
        if not ids:
            raise RLVRError(f"prompt {position} of {len(prompts)} has no tokens; remove it from the source")
        if max(ids) >= vocabulary:  # one such id ends the whole server
            raise RLVRError(
                f"prompt {position} of {len(prompts)} has token {max(ids)}, but the model's vocabulary ends at "
                f"{vocabulary - 1}; use the model's own tokenizer"
            )
    return encoded


def generate_payload(
    group: int, copies: range, prompt_ids: list[int], sampling: SamplingParams, eos_id: int, rid: str
) -> dict[str, Any]:
    """The request for samples number ``copies`` of one prompt; the server knows them by `sample_rids`.

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
        return {"input_ids": prompt_ids, "sampling_params": each[0], "return_logprob": True, "rid": rid}
    return {"input_ids": [prompt_ids] * len(each), "sampling_params": each, "return_logprob": True, "rid": rid}


def sample_rids(rid: str, count: int) -> list[str]:
    """The ids that a server gives to the ``count`` samples of request ``rid``."""
    return [rid] if count == 1 else [f"{rid}_{copy}" for copy in range(count)]


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


def check_versions(samples: Sequence[Sample], oldest: int, newest: int) -> None:
    """Only versions between the one served when the request left and the newest may have made a token.

    Raises:
        UnusableReplyError: If another did.
    """
    for sample in samples:
        versions = [version for version, _, _ in sample.version_spans]
        if versions != sorted(versions) or versions[0] < oldest or versions[-1] > newest:
            raise UnusableReplyError(f"weights of version {versions} answered, expected {oldest} to {newest}")


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
    # SGLang 0.5.17 calls an answer that ends with the last token of the budget truncated.
    ended = ids[-1] == tokenizer.eos_token_id
    return Sample(
        group=group,
        prompt_ids=prompt_ids,
        response_ids=ids,
        logprobs=logprobs,
        text=str(tokenizer.decode(ids, skip_special_tokens=True)),
        finish_reason=FinishReason.STOP if ended else _FINISHED[reason["type"]],
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
