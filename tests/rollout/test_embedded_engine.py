"""The embedded engine beyond what every engine owes (`test_engine_contract.py`): its draws, when it serves nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from megatron_rlvr.core import RLVRError, SamplingParams
from megatron_rlvr.rollout import EmbeddedEngine, generate_share, load_tokenizer, pad_id

BASE = Path(__file__).parents[2] / "examples" / "countdown" / "base"
CPU = torch.device("cpu")
PROMPTS = ["259:07;", "4", "111:03;1+1", "48:"]
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8, samples_per_prompt=6, seed=17)

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_file(BASE / "model.safetensors")


def fresh_engine(directory: Path = BASE) -> EmbeddedEngine:
    return EmbeddedEngine(directory, load_tokenizer(BASE), CPU)


@pytest.fixture(scope="module")
def engine(weights: Weights) -> EmbeddedEngine:
    served = fresh_engine()
    served.resync(weights.items(), version=5)
    return served


@pytest.fixture(scope="module")
def reference() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(BASE).eval()


def test_samples_depend_on_weights_prompts_and_seed_alone(engine: EmbeddedEngine, weights: Weights) -> None:
    first = engine.generate(PROMPTS, SAMPLING)
    torch.rand(7)
    assert engine.generate(PROMPTS, SAMPLING) == first
    twin = fresh_engine()
    twin.resync(weights.items(), version=5)
    assert twin.generate(PROMPTS, SAMPLING) == first
    assert engine.generate(PROMPTS, replace(SAMPLING, seed=18)) != first


def test_sampling_leaves_the_random_state_alone(engine: EmbeddedEngine) -> None:
    before = torch.get_rng_state()
    engine.generate(PROMPTS, SAMPLING)
    fresh_engine()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_frequencies_are_the_models_probabilities(
    engine: EmbeddedEngine, reference: Qwen3ForCausalLM, temperature: float
) -> None:
    """Chi-square on the first token; a truncated or unscaled distribution misses it by orders of magnitude."""
    draws, prompt = 6000, "48:"
    sampling = SamplingParams(temperature=temperature, max_new_tokens=1, samples_per_prompt=draws, seed=1)
    samples = engine.generate([prompt], sampling)
    with torch.no_grad():
        logits = reference(torch.tensor([samples[0].prompt_ids])).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1) * draws
    seen = torch.bincount(torch.tensor([sample.response_ids[0] for sample in samples]), minlength=len(expected))
    assert chi_square_tail(seen.double(), expected) > 1e-3
    other = (logits / (1.1 * temperature)).softmax(-1) * draws
    assert chi_square_tail(seen.double(), other) < 1e-3


def chi_square_tail(seen: torch.Tensor, expected: torch.Tensor) -> float:
    """Probability of a fit as bad as this one; cells that expect fewer than 5 draws are pooled."""
    cells = torch.where(expected >= 5, torch.arange(len(expected)) + 1, 0)
    seen, expected = (torch.zeros(len(cells) + 1).double().index_add(0, cells, part) for part in (seen, expected))
    seen, expected = seen[expected > 0], expected[expected > 0]
    assert len(expected) > 5
    statistic = ((seen - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model.extra.weight": torch.ones(2)}, r"version 8 sent model\.extra\.weight, which the rollout model does"),
        ({NORM: None}, r"version 8 left out 1 tensors, first model\.norm\.weight"),
        ({NORM: torch.ones(65)}, r"version 8 sent model\.norm\.weight as \(65,\); the rollout model has \(64,\)"),
    ],
)
def test_a_resync_that_fails_serves_nothing(
    weights: Weights, change: dict[str, torch.Tensor | None], sentence: str
) -> None:
    engine = fresh_engine()
    engine.resync(weights.items(), version=7)
    sent = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    with pytest.raises(RLVRError, match=sentence):
        engine.resync(sent.items(), version=8)
    assert engine.version is None
    with pytest.raises(RLVRError, match="no complete set of weights"):
        engine.generate(PROMPTS, SAMPLING)
    engine.resync(weights.items(), version=9)
    assert engine.generate(PROMPTS, SAMPLING)[0].weight_version == engine.version == 9


def test_the_trainers_dtype_wins_over_that_of_config_json(tmp_path: Path, weights: Weights) -> None:
    """A bf16 checkpoint trained in fp32 must not be sampled from in bf16."""
    shutil.copytree(BASE, tmp_path / "bf16")
    config = json.loads((BASE / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(config))
    engine, plain = fresh_engine(tmp_path / "bf16"), fresh_engine()
    for served in (engine, plain):
        served.resync(weights.items(), version=0)
    assert engine.generate(PROMPTS, SAMPLING) == plain.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_together_draw_what_one_rank_draws(engine: EmbeddedEngine, ranks: int) -> None:
    sampling = replace(SAMPLING, samples_per_prompt=2)
    alone = [
        sample
        for call in generate_share(engine, PROMPTS, sampling, prompts_per_call=1, rank=0, ranks=1)
        for sample in call
    ]
    together = [
        sample
        for rank in range(ranks)
        for call in generate_share(engine, PROMPTS, sampling, prompts_per_call=1, rank=rank, ranks=ranks)
        for sample in call
    ]
    assert sorted(together, key=lambda sample: sample.group) == alone


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(RLVRError, match=r"policy\.model=.*gone has no usable tokenizer .*add its files"):
        load_tokenizer(tmp_path / "gone")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(RLVRError, match=r"has no eos_token; set it in tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_padding_uses_the_tokenizers_own_token_or_eos() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert pad_id(tokenizer) == tokenizer.pad_token_id == 0
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id == 1
