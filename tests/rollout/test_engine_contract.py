"""What every engine owes the trainer, asked of the embedded one and of a real SGLang server alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from sglang_server import BASE, TOLERANCE, shared_fleet
from transformers import Qwen3ForCausalLM

from megatron_rlvr.core import FinishReason, RLVRError, RolloutBatch, SamplingParams
from megatron_rlvr.rollout import EmbeddedEngine, Engine, generate_share, load_tokenizer, pad_id

PROMPTS = ["259:07;", "4", "111:03;1+1", "48:"]
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8, samples_per_prompt=6, seed=17)

Weights = dict[str, torch.Tensor]
Fresh = Callable[[], Engine]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_file(BASE / "model.safetensors")


@pytest.fixture(scope="module")
def other_weights(weights: Weights) -> Weights:
    """Weights that the directory does not have, so that serving the old ones would show."""
    generator = torch.Generator().manual_seed(0)
    return {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}


@pytest.fixture(scope="module", params=["embedded", "sglang"])
def fresh(request: pytest.FixtureRequest) -> Fresh:
    """Makes engines before their first resync."""
    if request.param == "sglang":
        shared_fleet()  # skips here, once
        return shared_fleet
    return lambda: EmbeddedEngine(BASE, load_tokenizer(BASE), torch.device("cpu"))


@pytest.fixture
def engine(fresh: Fresh, weights: Weights) -> Engine:
    served = fresh()
    served.resync(weights.items(), version=5)
    return served


def tolerance(engine: Engine) -> float:
    """How far from a forward pass in float32 its log-probs may be, nats."""
    return 1e-5 if isinstance(engine, EmbeddedEngine) else TOLERANCE


def reference(weights: Weights) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM.from_pretrained(BASE).eval()
    model.load_state_dict(weights, strict=False)
    return model


def expected_logprobs(
    model: Qwen3ForCausalLM, prompt: list[int], response: list[int], temperature: float
) -> torch.Tensor:
    ids = torch.tensor(prompt + response)
    with torch.no_grad():
        logp_LV = (model(ids[None]).logits[0].double() / temperature).log_softmax(-1)
    return logp_LV[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_log_probs_are_those_of_a_forward_pass(engine: Engine, weights: Weights, temperature: float) -> None:
    model = reference(weights)
    for sample in engine.generate(PROMPTS, replace(SAMPLING, temperature=temperature)):
        expected = expected_logprobs(model, sample.prompt_ids, sample.response_ids, temperature)
        torch.testing.assert_close(torch.tensor(sample.logprobs).double(), expected, rtol=0.0, atol=tolerance(engine))


def test_a_resync_changes_what_is_served(engine: Engine, weights: Weights, other_weights: Weights) -> None:
    engine.resync(other_weights.items(), version=6)
    assert engine.version == 6
    new, old = reference(other_weights), reference(weights)
    gaps = []
    for sample in engine.generate(PROMPTS, SAMPLING):
        served = torch.tensor(sample.logprobs).double()
        expected = expected_logprobs(new, sample.prompt_ids, sample.response_ids, 1.0)
        torch.testing.assert_close(served, expected, rtol=0.0, atol=tolerance(engine))
        stale = expected_logprobs(old, sample.prompt_ids, sample.response_ids, 1.0)
        gaps.append(float((served - stale).abs().max()))
        assert sample.weight_version == 6
    assert max(gaps) > 0.1 + tolerance(engine)


def test_samples_come_in_prompt_order(engine: Engine) -> None:
    tokenizer = load_tokenizer(BASE)
    samples = engine.generate(PROMPTS, SAMPLING)
    assert [sample.group for sample in samples] == [group for group in range(4) for _ in range(6)]
    assert len({len(sample.prompt_ids) for sample in samples}) > 2  # an engine may pad them
    for sample in samples:
        assert sample.prompt_ids == tokenizer.encode(PROMPTS[sample.group])
    assert len(RolloutBatch.from_samples(samples, pad_id(tokenizer))) == 24


def test_a_response_ends_at_the_first_eos_or_at_the_budget(engine: Engine) -> None:
    tokenizer = load_tokenizer(BASE)
    samples = engine.generate(PROMPTS, replace(SAMPLING, samples_per_prompt=16))
    reasons = Counter(sample.finish_reason for sample in samples)
    assert min(reasons[FinishReason.STOP], reasons[FinishReason.LENGTH]) > 3
    for sample in samples:
        ended = tokenizer.eos_token_id in sample.response_ids
        assert (sample.finish_reason is FinishReason.STOP) == ended
        if ended:
            assert sample.response_ids.index(tokenizer.eos_token_id) == len(sample.response_ids) - 1
        else:
            assert len(sample.response_ids) == 8
        assert len(sample.logprobs) == len(sample.response_ids)
        assert len(sample.logprobs) == len(sample.response_ids)
        assert sample.text == tokenizer.decode(sample.response_ids, skip_special_tokens=True)
        assert "<eos>" not in sample.text


def test_versions_cover_every_token(engine: Engine) -> None:
    for sample in engine.generate(PROMPTS, SAMPLING):
        assert sample.weight_version == 5
        assert sample.version_spans in ([], [(5, 0, len(sample.response_ids))])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_frequencies_are_the_models_probabilities(engine: Engine, weights: Weights, temperature: float) -> None:
    """Pearson's statistic of the first token; truncation or a wrong temperature misses it by far."""
    draws = 2000
    sampling = SamplingParams(temperature=temperature, max_new_tokens=1, samples_per_prompt=draws // 8, seed=3)
    samples = engine.generate(["48:"] * 8, sampling)
    seen = torch.bincount(torch.tensor([sample.response_ids[0] for sample in samples]), minlength=32).double()
    model = reference(weights)
    logp_V = torch.stack(
        [expected_logprobs(model, samples[0].prompt_ids, [token], temperature)[0] for token in range(32)]
    )
    expected = logp_V.exp() * draws
    kept = expected >= 5
    cells = torch.cat([(seen - expected)[kept].square() / expected[kept]])
    freedom = max(int(kept.sum()) - 1, 1)
    assert float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), cells.sum() / 2)) > 1e-4
    assert float(seen[~kept].sum()) < expected[~kept].sum() + 6 * expected[~kept].sum().sqrt() + 1


def test_calls_of_several_ranks_make_one_step(engine: Engine) -> None:
    sampling = replace(SAMPLING, samples_per_prompt=2)
    samples = [
        sample
        for rank in range(2)
        for call in generate_share(engine, PROMPTS, sampling, prompts_per_call=1, rank=rank, ranks=2)
        for sample in call
    ]
    assert sorted(sample.group for sample in samples) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_nothing_is_served_before_the_first_resync(fresh: Fresh) -> None:
    engine = fresh()
    assert engine.version is None
    with pytest.raises(RLVRError, match="has no complete set of weights; resync it before generating"):
        engine.generate(PROMPTS, SAMPLING)


def test_a_resync_cut_off_by_the_trainer_serves_nothing(engine: Engine, weights: Weights) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter(weights.items()))
        raise ConnectionError("the trainer is gone")

    with pytest.raises(ConnectionError):
        engine.resync(broken(), version=6)
    assert engine.version is None
    with pytest.raises(RLVRError, match="no complete set of weights"):
        engine.generate(PROMPTS, SAMPLING)
    engine.resync(weights.items(), version=7)
    assert engine.generate(PROMPTS, SAMPLING)[0].weight_version == engine.version == 7


def test_a_prompt_without_tokens_is_refused(engine: Engine) -> None:
    with pytest.raises(RLVRError, match="prompt 1 of 2 has no tokens"):
        engine.generate(["48:", ""], SAMPLING)


def test_no_prompts_no_samples(engine: Engine) -> None:
    assert list(generate_share(engine, [], SAMPLING, prompts_per_call=2, rank=0, ranks=1)) == []
