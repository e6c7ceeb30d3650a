"""Every recipe by name: its paper's defaults, followed by hand through a few steps."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy import RECIPES, Actuation, RunPlan, build_recipe

DOCS = Path(__file__).parents[2] / "docs" / "entropy.md"
PLAN = RunPlan(total_steps=11, steps_per_epoch=4)
SHORT = RunPlan(total_steps=4, steps_per_epoch=2)

# recipe -> the run's plan, the entropies of its first steps, and what each of those steps does
FOLLOWED = {
    "none": (PLAN, [0.3, 0.1], [Actuation(), Actuation()]),
    # up while H >= 0.2, down while below, from 0 by 0.05; H_k moves step k + 1
    "par": (PLAN, [0.3, 0.3, 0.1, 0.3], [Actuation(positive_weight=w) for w in (0.0, 0.05, 0.1, 0.05)]),
    # e = 0.1: 1 + 0.2 + 0.01 is clipped and not summed; e = -0.1 twice: 1 - 0.2 - 0.01, 1 - 0.2 - 0.02
    "par_pi": (PLAN, [0.3, 0.1, 0.1, 0.1], [Actuation(positive_weight=w) for w in (1.0, 1.0, 0.79, 0.78)]),
    "par_stage": (SHORT, [0.3] * 4, [Actuation(positive_weight=w) for w in (0.0, 0.0, 0.5, 1.0)]),
    "par_epoch": (SHORT, [0.3] * 4, [Actuation(positive_weight=w) for w in (0.0, 0.0, 1.0, 1.0)]),
    # 0 to 1 in the run's four steps
    "schedule": (SHORT, [0.3] * 4, [Actuation(positive_weight=w) for w in (0.0, 1 / 3, 2 / 3, 1.0)]),
    "fixed": (PLAN, [0.3], [Actuation(positive_weight=0.5)]),
    "w_reinforce": (PLAN, [0.3], [Actuation(positive_weight=0.1)]),
    "nsr": (PLAN, [0.3], [Actuation(positive_weight=0.0)]),
    "psr": (PLAN, [0.3], [Actuation(negative_weight=0.0)]),
    # c: 0 | 0.005 | 0.01 | 0.005; the gate is open in steps 0, 1 and 3
    "ada_ent_reg": (PLAN, [0.1, 0.1, 0.3, 0.1], [Actuation(bonus=b) for b in (0.0, 0.005, 0.0, 0.005)]),
    "bonus": (PLAN, [0.3], [Actuation(bonus=0.001)]),
    # -2 x 0.005 x (H - 1)
    "siren": (PLAN, [1.0, 0.8, 1.2], [Actuation(bonus=b) for b in (0.0, 0.002, -0.002)]),
    # H - 0.1 + 0.01 x sum: 0.2 + 0.002, 0.2 + 0.004, -0.1 + 0.003
    "entropic": (PLAN, [0.3, 0.3, 0.0], [Actuation(gain=a) for a in (0.202, 0.204, -0.097)]),
    # band 0.6-0.7, then 0.58-0.68, then 0.56-0.66: inside, below, above
    "entrocraft": (
        *(PLAN, [0.65, 0.5, 0.7]),
        [Actuation(), Actuation(positive_weight=0.0), Actuation(negative_weight=0.0)],
    ),
    "stare": (PLAN, [0.4, 0.2], [Actuation(gain=0.0), Actuation(gain=0.1)]),
    # target 1: nothing, then 1 + 0.2 + 0.05 x 0.2
    "temperature_pi": (PLAN, [1.0, 0.8, 1.0], [Actuation(temperature=t) for t in (1.0, 1.0, 1.21)]),
    "clip_higher": (PLAN, [0.3], [Actuation(clip_high=0.28)]),
    # 2 - 0.005 x step
    "a3po": (PLAN, [0.3, 0.3, 0.3], [Actuation(gain=f) for f in (2.0, 1.995, 1.99)]),
    # below the first entropy twice as much, above it half
    "repo_r": (PLAN, [1.0, 0.9, 0.9, 1.1], [Actuation(gain=z) for z in (0.01, 0.02, 0.04, 0.02)]),
    **dict.fromkeys(
        ("gppo", "clip_cov", "kl_cov", "rand_pos_clip", "top_entropy", "entropy_advantage", "asym_grpo", "steer"),
        (PLAN, [0.3, 0.1], [Actuation(), Actuation()]),
    ),
}
RULES = {
    "clip_cov": {"share": 2e-4, "low": 1.0, "high": 5.0},
    "kl_cov": {"share": 2e-4, "coefficient": 1.0},
    "rand_pos_clip": {"share": 2e-4},
    "top_entropy": {"share": 0.2},
    "entropy_advantage": {"alpha": 0.4, "kappa": 2.0},
    "steer": {"form": "linear", "weight_min": 0.8, "weight_max": 1.2, "omega_floor": 0.02},
    "entropic": {"threshold": 0.95},
    "stare": {"share": 0.1, "both_signs": False},
    "a3po": {"share": 0.2},
    "siren": {"share": 0.2},
}
OBJECTIVES = {
    **dict.fromkeys(("w_reinforce", "nsr", "psr"), ("outcome", {}, {})),
    "asym_grpo": ("asym_grpo", {"b_plus": 0.5, "b_minus": 0.5}, {}),
    "gppo": ("", {}, {"surrogate": "gppo", "gppo_low": 0.5, "gppo_high": 1.0}),
}


def numbers(actuation):
    return pytest.approx(dataclasses.asdict(actuation), abs=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_steps_by_hand(name):
    plan, entropies, expected = FOLLOWED[name]
    control = build_recipe(name, plan).control
    for entropy, actuation in zip(entropies, expected, strict=True):
        assert dataclasses.asdict(control.decide(entropy)) == numbers(actuation)


@pytest.mark.parametrize("name", RECIPES)
def test_what_goes_with_it(name):
    recipe = build_recipe(name, PLAN)
    assert dataclasses.asdict(recipe.rule) == RULES.get(name, {})
    assert (recipe.advantages, recipe.advantage_options, recipe.loss) == OBJECTIVES.get(name, ("", {}, {}))
    assert (recipe.nucleus, recipe.trains_nucleus) == ((0.8, True) if name == "siren" else (None, False))


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_recipe_decides_bit_for_bit_the_same(name):
    entropies = [0.9, 0.4, 0.15, 0.1, 0.31, 0.7, 0.05, 0.05]
    whole, first, second = (build_recipe(name, PLAN, ema=0.6).control for _ in range(3))
    decided = [whole.decide(entropy) for entropy in entropies]
    again = [first.decide(entropy) for entropy in entropies[:3]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert again + [second.decide(entropy) for entropy in entropies[3:]] == decided
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_of_the_page_has_it(name):
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert any(re.match(rf"\| [^|]*`{name}`[^|]*\|", row) for row in rows)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("parr", {}, "'parr' is unknown; use 'par'"),
        ("fixed", {"target": "0.3"}, "entropy.target is '0.3' but recipe fixed has no target"),
        ("par", {"target": "lots"}, "entropy.target is 'lots'"),
        ("par", {"options": {"stepp": 0.1}}, "entropy.options.stepp is no option of recipe par; its options are step"),
        ("nsr", {"options": {"step": 0.1}}, "entropy.options.step is no option of recipe nsr; it has none"),
        ("par", {"options": {"step": "big"}}, "entropy.options.step is 'big'; it takes something like 0.05"),
        ("par", {"options": {"step": True}}, "entropy.options.step is True"),
        ("a3po", {"options": {"steps": 10.5}}, "entropy.options.steps is 10.5; it takes something like 200"),
        ("stare", {"options": {"both_signs": 1}}, "entropy.options.both_signs is 1; it takes something like False"),
        ("par", {"options": {"step": 3.0}}, "step_size is 3.0"),
        ("siren", {"signal": "rollout"}, "steers the nucleus entropy"),
        ("none", {"fallback_after": 5}, "recipe none has no target to fall behind"),
        ("ada_ent_reg", {"fallback_after": 5}, "acts on the entropy bonus itself"),
        ("top_entropy", {"options": {"share": 2.0}}, "share of tokens to take is 2.0"),
        ("a3po", {"options": {"start": 0.5}}, "gain of A3PO's token rule is 0.5"),
        ("entropic", {"options": {"low": -2.0}}, "gain of EntroPIC's token rule is -2.0"),
        ("schedule", {"options": {"shape": "sine"}}, "it is linear or cosine"),
        ("schedule", {"options": {"actuator": "clip_lwo"}}, "'clip_lwo' is unknown; use 'clip_low'"),
        ("schedule", {"options": {"actuator": "clip_low", "end": 2.0}}, "clip_low"),
        ("temperature_pi", {"options": {"low": 1.2}}, "rollout.temperature is 1.0 but temperature_pi moves within"),
        ("par", {"ema": 1.0}, "ema is 1.0"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(name, settings, said):
    with pytest.raises(RLVRError) as error:
        build_recipe(name, PLAN, **settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_fallback_joins_and_says_so():
    control = build_recipe("par", PLAN, fallback_after=3, alarm_after=2).control
    said, bonuses = [], []
    for _ in range(6):
        bonuses.append(control.decide(0.1).bonus)
        said.append(control.alarm)
    # lambda stays at 0, held below the target from the first step on; the coefficient starts in the third
    assert bonuses == pytest.approx([0, 0, 0, 1e-4, 2e-4, 3e-4])
    assert [text is not None for text in said] == [False, True, True, True, True, True]
    assert "at its lower bound 0" in said[-1]
