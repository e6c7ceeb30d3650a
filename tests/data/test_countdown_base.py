"""The committed base model: its tokenizer loses nothing, and it starts where RL needs it to start."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from megatron_rlvr.data.countdown import Problem, problems, solutions

EXAMPLE = Path(__file__).parents[2] / "examples" / "countdown"
BASE = EXAMPLE / "base"


@pytest.fixture(scope="module")
def make_base() -> ModuleType:
    """The example's script as a module."""
    specification = importlib.util.spec_from_file_location("countdown_make_base", EXAMPLE / "make_base.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(BASE)
    assert isinstance(loaded, PreTrainedTokenizerBase)
    return loaded


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(BASE)
    assert isinstance(loaded, Qwen3ForCausalLM)
    return loaded


def test_round_trip_over_the_whole_task(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [problem.text for problem in solutions()] + [text for answers in solutions().values() for text in answers]
    encoded = tokenizer(texts)["input_ids"]
    assert [len(ids) for ids in encoded] == [len(text) for text in texts]
    assert tokenizer.batch_decode(encoded) == texts


def test_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer("1;")["input_ids"][-1] != tokenizer.eos_token_id, "nothing is appended to a prompt"
    ids = tokenizer("2+5<eos>")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([*ids, 0, 0], skip_special_tokens=True) == "2+5"
    assert sorted(tokenizer.get_vocab().values()) == list(range(32)), "no holes"
    assert set(tokenizer("1")) == {"input_ids", "attention_mask"}, "generate accepts the whole encoding"


def test_a_foreign_character_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer("259:16;é")


def test_greedy_answers(make_base: ModuleType, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    heldout = problems("heldout")
    inputs = tokenizer([problem.text for problem in heldout], return_tensors="pt")
    rows_BL = model.generate(**inputs, do_sample=False, temperature=None)
    output_BL = rows_BL[:, inputs["input_ids"].shape[1] :]
    ended = (output_BL == tokenizer.eos_token_id).any(dim=1).float().mean().item()
    assert ended > 0.95
    answers = tokenizer.batch_decode(output_BL, skip_special_tokens=True)
    right = sum(make_base.solves(problem, answer) for problem, answer in zip(heldout, answers, strict=True))
    assert right / len(heldout) > 0.15


def test_recorded_figures_are_those_of_the_committed_weights(
    make_base: ModuleType, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    recorded = json.loads((BASE / "TRAINING.json").read_text())["heldout"]
    measured = make_base.evaluate(model, tokenizer, seed=1)
    assert measured["accuracy"] == pytest.approx(recorded["accuracy"], abs=0.08)
    assert measured["entropy"] == pytest.approx(recorded["entropy"], abs=0.08)
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 2_000_000


def test_the_script_builds_the_committed_tokenizer_and_shape(
    make_base: ModuleType, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    fresh = make_base.build_tokenizer()
    assert fresh.get_vocab() == tokenizer.get_vocab()
    shapes = {name: tuple(weight.shape) for name, weight in make_base.build_model(fresh).state_dict().items()}
    assert shapes == {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def test_labels_cover_answer_and_eos_only(make_base: ModuleType, tokenizer: PreTrainedTokenizerBase) -> None:
    inputs_BL, labels_BL = make_base.training_batch(tokenizer, random.Random(0))
    answers = {(problem.text, answer) for problem, found in solutions().items() for answer in found}
    for row_L, label_L in zip(inputs_BL, labels_BL, strict=True):
        learned = label_L != -100
        assert torch.equal(row_L[learned], label_L[learned])
        assert label_L[learned][-1] == tokenizer.eos_token_id
        answer = tokenizer.decode(label_L[learned][:-1])
        prompt = tokenizer.decode(row_L[: int(learned.int().argmax())])
        assert (prompt, answer) in answers
        assert (row_L[~learned][len(prompt) :] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("2+5+9", True),
        ("(9+(5)+2)", True),
        ("2+5+5", False),
        ("2+5", False),
        ("25-9", False),
        ("16", False),
        ("", False),
        ("2+5+9;", False),
        ("2+5+9+0", False),
        ("2--5+9", False),
        ("9%5*2", False),
        ("(2+5+9", False),
        ("2+5+09", False),
        (" 2+5+9", False),
    ],
)
def test_the_evaluation_judges_soundly(make_base: ModuleType, answer: str, right: bool) -> None:
    assert make_base.solves(Problem((2, 5, 9), 16), answer) is right
