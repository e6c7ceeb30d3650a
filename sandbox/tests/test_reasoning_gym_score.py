"""reasoning-gym's scorers behind the checker: oracles pass, hostile text runs nothing, loose scorers earn nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rlvr_sandbox.checkers import reasoning_gym_score
from rlvr_sandbox.checkers.reasoning_gym_score import judge
from rlvr_sandbox.specs_reasoning_gym import ReasoningGymSpec

gym: Any = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")

from reasoning_gym.factory import DATASETS  # noqa: E402 - only where the package is there

NAMES = sorted(set(DATASETS) - {"composite"})
# Its oracle leaves some integrals undone, which is no answer.
UNDONE = "Integral("


def spec_of(name: str, index: int = 0, **config: Any) -> dict[str, Any]:
    entry = gym.create_dataset(name, size=index + 1, seed=11, **config)[index]
    kept = json.loads(json.dumps({"answer": entry["answer"], "metadata": entry["metadata"]}))
    return ReasoningGymSpec.model_validate({"dataset": name, "entry": kept, "config": config}).model_dump()


def verdict(answer: str, spec: dict[str, Any]) -> str:
    return judge(f"I think <answer>{answer}</answer>", spec).verdict


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_is_accepted_and_nothing_else_is_executed(name: str, tmp_path: Path) -> None:
    spec = spec_of(name)
    oracle = spec["entry"]["answer"]
    if oracle is not None and UNDONE not in oracle:
        assert verdict(oracle, spec) == "accepted"
    mark = tmp_path / "mark"
    hostile = [
        f"__import__('pathlib').Path({str(mark)!r}).touch()",
        f"open({str(mark)!r}, 'w')",
        "exec(chr(49))",
        "().__class__.__bases__[0].__subclasses__()",
        "[c for c in ().__class__.__base__.__subclasses__()]",
        "lambda: 1",
        "9**9**9**9",
        "'a' * 9999999999",
        "1 << 99999999999",
        "[" * 5_000,
        "none of it, really",
    ]
    for text in hostile:
        assert verdict(text, spec) != "accepted"
        assert judge(text, spec).verdict in ("wrong_answer", "no_answer")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("game_of_life_halting", "anything at all"),
        ("game_of_life_halting", "True False"),
        ("puzzle24", "6*4*1*1"),
    ],
)
def test_scorers_that_accept_anything_earn_nothing(name: str, answer: str) -> None:
    assert all(verdict(answer, spec_of(name, index)) != "accepted" for index in range(6))


def test_a_partial_score_is_in_the_detail_and_no_reward() -> None:
    spec = spec_of("word_sorting")
    words = spec["entry"]["metadata"]["sorted_words"]
    judgement = judge(f"<answer>{', '.join(reversed(words))}</answer>", spec)
    assert judgement.verdict == "wrong_answer"
    assert judgement.detail.startswith("score 0.")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("{oracle}", "accepted"),
        ("<answer>{oracle}</answer>", "accepted"),
        ("\\boxed{{{oracle}}}", "accepted"),
        ("<answer>{oracle}</answer> or <answer>x</answer>", "wrong_answer"),
        ("I say {oracle}", "wrong_answer"),
        ("<answer></answer>", "no_answer"),
        ("", "no_answer"),
    ],
)
def test_where_the_answer_stands(response: str, expected: str) -> None:
    spec = spec_of("spell_backward")
    assert judge(response.format(oracle=spec["entry"]["answer"]), spec).verdict == expected


def test_tuples_that_json_made_lists_still_score() -> None:
    for name in ("arc_agi", "rearc"):
        spec = spec_of(name, 2)
        assert verdict(spec["entry"]["answer"], spec) == "accepted"


def test_the_settings_reach_the_scorer() -> None:
    wide = spec_of("decimal_arithmetic", min_num_decimal_places=2, max_num_decimal_places=2)
    value = float(wide["entry"]["answer"])
    assert verdict(f"{value:.6f}", wide) == "accepted"
    assert verdict(f"{value + 1:.2f}", wide) == "wrong_answer"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dataset": "no_such_set"}, "has no dataset 'no_such_set'"),
        ({"config": {"no_such_setting": 1}}, "refuses config"),
    ],
)
def test_a_bad_spec_is_no_verdict(change: dict[str, Any], sentence: str) -> None:
    judgement = judge("<answer>x</answer>", spec_of("spell_backward") | change)
    assert judgement.verdict == "infra_error"
    assert sentence in judgement.detail


def test_without_the_package_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("spell_backward")
    reasoning_gym_score._datasets.cache_clear()
    reasoning_gym_score._dataset.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    judgement = judge("<answer>x</answer>", spec)
    assert judgement.verdict == "infra_error"
    assert "pip install" in judgement.detail
    reasoning_gym_score._datasets.cache_clear()
