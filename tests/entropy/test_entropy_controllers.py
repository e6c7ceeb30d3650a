"""Controllers and recipes against hand-computed sequences, bounds, resume at any step and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy import (
    Constant,
    Controller,
    EntropyGuided,
    EpochWise,
    StageBased,
    build_controller,
    mean_entropy,
)

RECIPES = ["none", "par", "par_stage", "par_epoch"]


def build(recipe: str, step_size: float = 0.05, initial: float = 0.0, total_steps: int = 12) -> Controller:
    """A recipe with the paper's target and three epochs."""
    return build_controller(
        recipe, target=0.2, step_size=step_size, initial=initial, total_steps=total_steps, steps_per_epoch=5
    )


def used_values(controller: Controller, signals: Sequence[float]) -> list[float]:
    """The value that each step uses."""
    used = []
    for signal in signals:
        used.append(controller.value)
        assert controller.update(signal) == controller.value
    return used


def test_entropy_guided_follows_equation_5() -> None:
    controller = EntropyGuided()
    #                                   plus  plus  at delta: plus  minus  minus  minus  stays  plus
    used = used_values(controller, [0.3, 9.0, 0.2, 0.1999, 0.0, 0.1, 0.1, 0.5])
    assert used == [0.0, 0.05, 0.1, 0.15, 0.1, 0.05, 0.0, 0.0]
    assert controller.value == 0.05
    assert (controller.saturated_low, controller.saturated_high) == (3, 0)


def test_twenty_steps_of_a_twentieth_are_exactly_one_and_back() -> None:
    controller = EntropyGuided()
    up = used_values(controller, [1.0] * 22)
    assert up[19] == 0.95
    assert up[20] == up[21] == controller.value == 1.0
    down = used_values(controller, [0.0] * 21)
    assert down[1] == 0.95
    assert down[20] == controller.value == 0.0
    assert (controller.saturated_low, controller.saturated_high) == (2, 3)
    drifting = 0.0
    for _ in range(20):
        drifting += 0.05
    assert drifting != 1.0, "floats would have missed the bound"


def test_steps_that_do_not_divide_the_range_stop_at_the_bound_and_restart_there() -> None:
    assert used_values(EntropyGuided(step_size=0.4, initial=0.1), [1, 1, 1, 0, 0, 0, 1]) == [
        *(0.1, 0.5, 0.9, 1.0),
        *(0.6, 0.2, 0.0),
    ]


@pytest.mark.parametrize(
    ("total_steps", "expected"),
    [
        (1, [1.0]),
        (2, [0.0, 1.0]),
        (5, [0.0, 0.0, 1 / 3, 2 / 3, 1.0]),
        (8, [0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_stage_based_is_zero_for_half_then_linear_to_one(total_steps: int, expected: list[float]) -> None:
    assert used_values(StageBased(total_steps), [0.1] * (total_steps + 2)) == [*expected, 1.0, 1.0]


def test_epoch_wise_rises_at_each_epoch() -> None:
    controller = EpochWise(epochs=3, steps_per_epoch=2)
    assert used_values(controller, [0.1] * 8) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert (controller.saturated_low, controller.saturated_high) == (2, 4)


def test_recipes() -> None:
    signals = [0.3] * 12
    assert used_values(build("none"), signals) == [1.0] * 12
    assert used_values(build("par"), signals)[:3] == [0.0, 0.05, 0.1]
    assert used_values(build("par_stage"), signals) == [*[0.0] * 6, *(k / 6 for k in range(1, 7))]
    assert used_values(build("par_epoch"), signals) == [0.0] * 5 + [0.5] * 5 + [1.0] * 2
    assert build("none").update(0.3) == 1.0
    assert Constant(1.0).saturated_high == 0


@given(
    signals=st.lists(st.floats(0.0, 5.0), max_size=80),
    step_size=st.floats(1e-4, 1.0),
    initial=st.floats(0.0, 1.0),
    target=st.floats(0.0, 5.0),
)
def test_entropy_guided_equals_the_paper_within_rounding_and_keeps_its_bounds(
    signals: list[float], step_size: float, initial: float, target: float
) -> None:
    controller = EntropyGuided(target=target, step_size=step_size, initial=initial)
    value, low, high = initial, 0, 0
    for signal in signals:
        assert controller.value == pytest.approx(value, abs=1e-12)
        low, high = low + (controller.value == 0.0), high + (controller.value == 1.0)
        value = min(max(value + (-step_size if signal < target else step_size), 0.0), 1.0)
        assert 0.0 <= controller.update(signal) <= 1.0
    assert (controller.saturated_low, controller.saturated_high) == (low, high)


@given(
    recipe=st.sampled_from(RECIPES),
    signals=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30),
    cut=st.integers(0, 30),
    step_size=st.floats(0.001, 1.0),
)
def test_resuming_at_any_step_changes_nothing(recipe: str, signals: list[float], cut: int, step_size: float) -> None:
    uninterrupted, first, second = (build(recipe, step_size, 0.37, total_steps=30) for _ in range(3))
    whole = used_values(uninterrupted, signals)
    parts = used_values(first, signals[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert parts + used_values(second, signals[cut:]) == whole
    assert second.state_dict() == uninterrupted.state_dict()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("signal", [math.nan, math.inf, -math.inf])
def test_non_finite_entropy_is_refused_and_changes_nothing(recipe: str, signal: float) -> None:
    controller = build(recipe)
    controller.update(0.3)
    before = controller.state_dict()
    with pytest.raises(RLVRError, match=f"entropy of step 1 is {signal}"):
        controller.update(signal)
    assert controller.state_dict() == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_foreign_or_partial_state_is_refused(recipe: str) -> None:
    controller = build(recipe)
    own = controller.state_dict()
    for other in RECIPES:
        if other != recipe:
            with pytest.raises(RLVRError, match=f"needs {own['kind']}"):
                controller.load_state_dict(build(other).state_dict())
    del own["steps"]
    with pytest.raises(RLVRError, match="lacks steps"):
        controller.load_state_dict(own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "par_stages"}, "use 'par_stage' or another"),
        ({"recipe": "grpo"}, "is unknown; use 'par"),
        ({"recipe": "par", "target": -0.1}, "target is -0.1"),
        ({"recipe": "par", "target": math.nan}, "target is nan"),
        ({"recipe": "par", "step_size": 0.0}, "step_size is 0.0"),
        ({"recipe": "par", "step_size": math.nan}, "step_size is nan"),
        ({"recipe": "par", "initial": 1.1}, "initial is 1.1"),
        ({"recipe": "par_stage", "total_steps": 0}, "total_steps is 0"),
        ({"recipe": "par_epoch", "steps_per_epoch": 0}, "steps_per_epoch is 0"),
        ({"recipe": "par_epoch", "total_steps": 5}, "at least two epochs"),
    ],
)
def test_bad_settings_are_refused_in_words(change: dict[str, float], message: str) -> None:
    settings = {"target": 0.2, "step_size": 0.05, "initial": 0.0, "total_steps": 12, "steps_per_epoch": 5, **change}
    with pytest.raises(RLVRError, match=message):
        build_controller(**settings)  # type: ignore[arg-type]


def test_mean_entropy_is_a_ratio_and_needs_tokens() -> None:
    assert mean_entropy(3.0, 12) == 0.25
    with pytest.raises(RLVRError, match="covers 0 response tokens"):
        mean_entropy(0.0, 0)
