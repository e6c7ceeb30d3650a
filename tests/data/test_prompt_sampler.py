"""The sampling order: a permutation per epoch, a bit-equal continuation, and no foreign position accepted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.core import Prompt, RLVRError
from megatron_rlvr.data import PromptSampler


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(id=str(i), text=f"question {i}", kind="math", spec={"answer": str(i)}) for i in range(count)]


@given(size=st.integers(1, 30), seed=st.integers(0, 2**31), takes=st.lists(st.integers(0, 70), max_size=6))
def test_every_epoch_is_a_permutation_however_it_is_taken(size: int, seed: int, takes: list[int]) -> None:
    prompts = make_prompts(size)
    sampler = PromptSampler(prompts, seed)
    taken = [prompt for count in takes for prompt in sampler.take(count)]
    assert len(taken) == sum(takes)
    whole = len(taken) // size * size
    for start in range(0, whole, size):
        assert sorted(int(prompt.id) for prompt in taken[start : start + size]) == list(range(size))
    rest = taken[whole:]
    assert len({prompt.id for prompt in rest}) == len(rest)
    assert taken == PromptSampler(prompts, seed).take(sum(takes))


@given(
    size=st.integers(1, 30), seed=st.integers(0, 2**31), before=st.lists(st.integers(0, 40)), after=st.integers(0, 70)
)
def test_resume_continues_exactly(size: int, seed: int, before: list[int], after: int) -> None:
    sampler = PromptSampler(make_prompts(size), seed)
    for count in before:
        sampler.take(count)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = PromptSampler(make_prompts(size), seed)
    resumed.take(3)  # A position reached before loading must leave no trace.
    resumed.load_state_dict(state)
    assert resumed.epoch == sampler.epoch
    assert resumed.take(after) == sampler.take(after)
    assert resumed.state_dict() == sampler.state_dict()


def test_epoch_is_that_of_the_last_prompt_taken() -> None:
    sampler = PromptSampler(make_prompts(4), 0)
    assert sampler.epoch == 0
    epochs = []
    for _ in range(9):
        sampler.take(1)
        epochs.append(sampler.epoch)
    assert epochs == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_order_depends_on_seed_and_epoch_and_is_pinned() -> None:
    """The pinned order guards resumed runs against a change of the shuffle."""
    sampler = PromptSampler(make_prompts(8), 7)
    first, second = ([prompt.id for prompt in sampler.take(8)] for _ in range(2))
    assert first == list("51260347")
    assert second == list("35461207")
    assert [prompt.id for prompt in PromptSampler(make_prompts(8), 8).take(8)] not in (first, second)


def test_first_place_is_uniform() -> None:
    """Over 2,000 seeds each of 5 prompts comes first about 400 times (binomial, within four standard deviations)."""
    prompts = make_prompts(5)
    counts = dict.fromkeys("01234", 0)
    for seed in range(2000):
        counts[PromptSampler(prompts, seed).take(1)[0].id] += 1
    assert all(abs(count - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5 for count in counts.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 9}, "size 9 and this run 8"),
        ({"seed": 2}, "seed 2 and this run 1"),
        ({"fingerprint": "00"}, "changed or reordered"),
        ({"taken": -1}, "taken -1"),
        ({"taken": "3"}, "taken '3'"),
        ({"taken": True}, "taken True"),
        ({"extra": 1}, "has the keys"),
    ],
)
def test_foreign_positions_are_refused_and_change_nothing(change: dict[str, Any], message: str) -> None:
    sampler = PromptSampler(make_prompts(8), 1)
    sampler.take(5)
    before = sampler.state_dict()
    with pytest.raises(RLVRError, match=message):
        sampler.load_state_dict(before | change)
    assert sampler.state_dict() == before


def test_a_missing_key_is_refused() -> None:
    sampler = PromptSampler(make_prompts(8), 1)
    state = sampler.state_dict()
    del state["taken"]
    with pytest.raises(RLVRError, match="has the keys"):
        sampler.load_state_dict(state)


@pytest.mark.parametrize("change", ["id", "text", "kind", "spec", "order"])
def test_fingerprint_sees_every_field_and_the_order(change: str) -> None:
    prompts = make_prompts(8)
    state = PromptSampler(prompts, 1).state_dict()
    if change == "order":
        prompts = prompts[::-1]
    else:
        value: Any = {"answer": "other"} if change == "spec" else "other"
        fields = {"id": "0", "text": "question 0", "kind": "math", "spec": {"answer": "0"}} | {change: value}
        prompts = [Prompt(**fields), *prompts[1:]]
    with pytest.raises(RLVRError, match="fingerprint"):
        PromptSampler(prompts, 1).load_state_dict(state)


def test_empty_and_negative_are_refused() -> None:
    with pytest.raises(RLVRError, match="empty"):
        PromptSampler([], 0)
    with pytest.raises(ValueError, match="-1"):
        PromptSampler(make_prompts(2), 0).take(-1)
