"""The one-machine engine: Hugging Face ``generate`` with a KV cache, in the trainer's process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from megatron_rlvr.core import FinishReason, RLVRError, Sample, SamplingParams
from megatron_rlvr.rollout.engine import NamedTensors


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises:
        RLVRError: If it is missing or has no end-of-sequence token.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RLVRError(f"policy.model={directory} has no usable tokenizer ({reason}); add its files") from None
    if tokenizer.eos_token_id is None:
        raise RLVRError(f"the tokenizer of policy.model={directory} has no eos_token; set it in tokenizer_config.json")
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills unused positions: the tokenizer's own, or end-of-sequence where it has none."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


class EmbeddedEngine:
    """Serves the architecture of a model directory; its weights come from the trainer by `resync` only."""

    def __init__(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Build the model without weights; they arrive with the first resync.

        Args:
            directory: Hugging Face model directory, read for its configuration.
            tokenizer: The model's tokenizer.
            device: Where to run.
        """
        with torch.random.fork_rng(devices=[]):
            self._model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
        self._model.to(device).eval()
        self._tokenizer = tokenizer
        self._version: int | None = None

    @property
    def version(self) -> int | None:
        """See `Engine.version`."""
        return self._version

    @torch.no_grad()
    def resync(self, tensors: NamedTensors, version: int) -> None:
        """See `Engine.resync`."""
        self._version = None
        own = dict(self._model.named_parameters())
        missing = set(own)
        for name, tensor in tensors:
            if name not in own:
                raise RLVRError(f"resync to version {version} sent {name}, which the rollout model does not have")
            if own[name].shape != tensor.shape:
                raise RLVRError(
                    f"resync to version {version} sent {name} as {tuple(tensor.shape)}; "
                    f"the rollout model has {tuple(own[name].shape)}"
                )
            if own[name].dtype != tensor.dtype:  # config.json may name another dtype than the trainer computes in
                own[name].data = torch.empty_like(own[name], dtype=tensor.dtype)
            own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise RLVRError(f"resync to version {version} left out {len(missing)} tensors, first {min(missing)}")
        self._version = version

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], sampling: SamplingParams) -> list[Sample]:
        """See `Engine.generate`."""
        if self._version is None:
            raise RLVRError("the embedded engine has no complete set of weights; resync it before generating")
        device = self._model.device
        prompt_ids = [self._tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
        if [] in prompt_ids:
            raise RLVRError(f"prompt {prompt_ids.index([])} of {len(prompts)} has no tokens; remove it from the source")
        width = max(map(len, prompt_ids))
        ids_BL = torch.full((len(prompts), width), pad_id(self._tokenizer), device=device)
        attend_BL = torch.zeros_like(ids_BL)
        for row, ids in enumerate(prompt_ids):  # left padding: all responses start in the same column
            ids_BL[row, width - len(ids) :] = torch.tensor(ids)
            attend_BL[row, width - len(ids) :] = 1
        recorder = _LogprobRecorder(sampling.temperature)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            output_BL = self._model.generate(
                input_ids=ids_BL,
                attention_mask=attend_BL,
                generation_config=self._generation_config(sampling),
                logits_processor=LogitsProcessorList([recorder]),
            )
        response_BL = output_BL[:, width:].cpu()
        logprobs_BL = recorder.logprobs(output_BL[:, -1]).cpu()
        return [
            self._sample(row // sampling.samples_per_prompt, prompt_ids, response_BL[row], logprobs_BL[row])
            for row in range(len(response_BL))
        ]

    def _generation_config(self, sampling: SamplingParams) -> GenerationConfig:
        # Temperature is the recorder's; top-k and top-p stay off, or samples would not come from the policy.
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.samples_per_prompt,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=pad_id(self._tokenizer),
        )

    def _sample(self, group: int, prompt_ids: list[list[int]], ids_L: torch.Tensor, logprobs_L: torch.Tensor) -> Sample:
        ended = (ids_L == self._tokenizer.eos_token_id).nonzero()
        length = int(ended[0]) + 1 if len(ended) else len(ids_L)
        response = ids_L[:length].tolist()
        assert self._version is not None
        return Sample(
            group=group,
            prompt_ids=prompt_ids[group],
            response_ids=response,
            logprobs=logprobs_L[:length].tolist(),
            text=str(self._tokenizer.decode(response, skip_special_tokens=True)),
            finish_reason=FinishReason.STOP if len(ended) else FinishReason.LENGTH,
            weight_version=self._version,
        )


class _LogprobRecorder(LogitsProcessor):  # type: ignore[misc]
    """Applies the temperature and keeps the log-prob of each drawn token, holding one step's ``[B, V]`` at a time."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._last_BV: torch.Tensor | None = None
        self._columns: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._take(input_ids[:, -1])
        self._last_BV = torch.log_softmax(scores.float() / self._temperature, -1)
        return self._last_BV

    def _take(self, ids_B: torch.Tensor) -> None:
        if self._last_BV is not None:
            self._columns.append(self._last_BV.gather(1, ids_B[:, None])[:, 0])

    def logprobs(self, last_ids_B: torch.Tensor) -> torch.Tensor:
        """Log-probs ``[B, L]`` of all drawn tokens, given those of the last step."""
        self._take(last_ids_B)
        self._last_BV = None
        return torch.stack(self._columns, 1)
