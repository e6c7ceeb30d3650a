"""From a configuration to the objective of a step: what fits, what is refused, and who decides."""

import pytest
import torch

from megatron_rlvr.config import load_config
from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy import RECIPES, Actuation
from megatron_rlvr.objective import LossInputs, LossSettings, Outcomes, actuated
from megatron_rlvr.training.composition import compose_run

REQUIRED = ("run.dir=r", "data.train=countdown:train", "policy.model=m")


def composed(*overrides):
    return compose_run(load_config(None, [*REQUIRED, *overrides]), prompts=2000)


def outcomes():
    return Outcomes(
        torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.ones(6, dtype=torch.bool),
        lengths_B=torch.tensor([1, 2, 3, 4, 5, 6]),
        mean_logprob_B=-torch.arange(6.0),
    )


def test_the_defaults_are_the_papers_objective():
    composition = composed()
    assert composition.loss == LossSettings(surrogate="ppo", clip_low=0.2, clip_high=0.2)
    assert composition.mismatch is None
    assert composition.aggregation == ("token_mean", None)
    advantages_B = composition.estimator(outcomes())
    spread = (2 / 9 * 3 / 2) ** 0.5  # of 1, 0, 0: variance 2/9, unbiased 1/3
    assert advantages_B[:3].tolist() == pytest.approx([2 / 3 / spread, -1 / 3 / spread, -1 / 3 / spread], abs=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_gives_a_loss(recipe):
    composition = composed(f"entropy.recipe={recipe}", "entropy.target=")
    actuation = composition.recipe.control.decide(0.3)
    objective = composition.objective(actuation, age=2)
    logprob = torch.full((4,), -1.0, requires_grad=True)
    extra = {"nucleus_entropy": torch.ones(4)} if objective.nucleus else {}
    inputs = LossInputs(
        logprob,
        old_logprob=torch.full((4,), -1.1),
        advantages=torch.tensor([1.0, -1.0, 0.0, 2.0]),
        entropy=torch.ones(4),
        mask=torch.ones(4, dtype=torch.bool),
        entropy_slope=torch.full((4,), -0.5),
        entropy_grad_norm=torch.full((4,), 0.5),
        **extra,
    )
    outputs = objective.loss(inputs)
    torch.autograd.backward(outputs.loss_sum)
    assert logprob.grad is not None
    assert bool(logprob.grad.isfinite().all())
    drives = [outputs.metrics[f"entropy_drive/{name}"][0] for name in ("positive", "negative", "bonus", "age_2")]
    assert float(drives[3]) == pytest.approx(float(sum(drives[:3])))


def test_the_actuation_changes_what_it_names_and_nothing_else():
    settings = LossSettings(clip_low=0.1, clip_high=0.3, positive_weight=0.5, bonus=0.01, dual_clip=3.0)
    assert actuated(settings, Actuation()) == settings
    moved = actuated(settings, Actuation(0.5, 0.25, 0.02, clip_high=0.4))
    assert (moved.positive_weight, moved.negative_weight, moved.bonus) == (0.25, 0.25, 0.03)
    assert (moved.clip_low, moved.clip_high, moved.dual_clip) == (0.1, 0.4, 3.0)


def test_options_reach_their_parts():
    composition = composed(
        *("objective.advantages=pass_at_k", "objective.advantage_options.k=2", "objective.mismatch=tis"),
        *("objective.mismatch_options.high=1.5", "objective.surrogate_options.dual_clip=3.0", "objective.kl=0.1"),
        *("objective.aggregation=constant", "rollout.max_new_tokens=77", "entropy.options.step=0.1"),
    )
    assert composition.mismatch is not None
    assert composition.mismatch.high == 1.5
    assert (composition.loss.dual_clip, composition.loss.kl) == (3.0, 0.1)
    assert composition.aggregation == ("constant", 77.0)
    # one right of three, pairs: F = C(2,2)/C(3,2) = 1/3, A(right) = sqrt(1/2)
    assert composition.estimator(outcomes())[0].item() == pytest.approx(0.5**0.5)
    composition.recipe.control.decide(0.3)
    assert composition.recipe.control.decide(0.3).positive_weight == pytest.approx(0.1)


def test_whitening_is_over_tokens_and_before_the_sign():
    plain, white = composed().estimator(outcomes()), composed("objective.whiten=true").estimator(outcomes())
    lengths_B = outcomes().lengths_B
    assert lengths_B is not None
    assert float((white * lengths_B).sum()) == pytest.approx(0.0, abs=1e-5)
    assert float((white.square() * lengths_B).sum() / (lengths_B.sum() - 1)) == pytest.approx(1.0, abs=1e-4)
    assert abs(float((plain * lengths_B).sum())) > 0.1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["entropy.recipe=nsr", "objective.advantages=grpo"],
            "is grpo but recipe nsr needs outcome",
        ),
        (["entropy.recipe=gppo", "objective.surrogate=ppo"], "objective.surrogate is ppo but recipe gppo needs gppo"),
        (["entropy.recipe=w_reinforce", "objective.whiten=true"], "whitening moves the sign"),
        (["entropy.recipe=repo_r", "objective.surrogate=gspo"], "surrogate gspo"),
        (["entropy.recipe=kl_cov", "objective.surrogate=cispo"], "KL-Cov"),
        (["entropy.recipe=kl_cov", "objective.minibatches=1"], "KL-Cov"),
        (["objective.advantages=pass_at_k"], "objective.advantage_options.k"),
        (
            ["rollout.overlong=penalize", "rollout.overlong_buffer=9", "entropy.recipe=asym_grpo"],
            "the asym_grpo advantages take only right and wrong",
        ),
        (["objective.advantage_options.k=3"], "objective.advantage_options.k is no option; there are none here"),
        (["objective.mismatch_options.high=3"], "objective.mismatch_options.high is no option"),
        (["objective.mismatch=tis", "objective.mismatch_options.hi=3"], "known here: level, mode, low, high, veto"),
        (["objective.surrogate_options.clip_low=3"], "objective.surrogate_options.clip_low is no option"),
        (["objective.surrogate_options.dual_clip=0.5"], "dual_clip is 0.5"),
        (["objective.surrogate=gspo", "policy.context_parallel=2"], "needs each sequence whole"),
        (["entropy.options.stepp=1"], "entropy.options.stepp"),
    ],
)
def test_contradictions_are_refused_in_a_sentence(overrides, said):
    with pytest.raises(RLVRError) as error:
        composed(*overrides)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
