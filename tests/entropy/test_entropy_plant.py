"""The paper's claims on the tabular plant (examples/tabular_plant.py), run by run from the same start.

Random reward, Adam, clip 0.2, N = 4 unless said: nothing can be learned, so only the update rule moves the entropy.
Where a claim fails on this plant the test says so. `benchmarks/entropy_plant.py` has more seeds, steps and recipes.
"""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from tabular_plant import Plant, run

SEEDS = (0, 1)
STEPS = 100


@functools.cache
def trace(seed, recipe="none", target="", option=None, **settings):
    options = {} if option is None else dict([option])
    return run(Plant(recipe, target, options, seed=seed, **{"steps": STEPS, **settings}))


def end(seed, *recipe, **settings):
    """The entropy at the end as a share of the entropy at the start."""
    entropies = trace(seed, *recipe, **settings).entropy
    return entropies[-1] / entropies[0]


def fixed(positive_weight):
    return "fixed", "", ("positive_weight", positive_weight)


@pytest.mark.parametrize("seed", SEEDS)
class TestOnRandomRewards:
    def test_c1_grpo_collapses_when_it_reuses_its_samples(self, seed):
        """With each sample used once it only sinks within these steps: collapse here needs the reuse."""
        assert end(seed, reuse=4, steps=60) < 0.5
        assert 0.6 < end(seed) < 0.95

    def test_c2_more_updates_sink_it_faster(self, seed):
        assert end(seed, updates=8) < end(seed) < end(seed, updates=1)

    def test_c4_positives_sink_it_and_negatives_raise_it(self, seed):
        assert end(seed, negative_weight=0.0) < end(seed) - 0.1
        assert end(seed, *fixed(0.0)) > 1.1

    def test_c5_a_smaller_weight_of_positives_keeps_more_but_saturates(self, seed):
        """The claim of a monotone effect fails here: from 0.5 downwards it is within a few percent."""
        at_half, at_none = end(seed, *fixed(0.5)), end(seed, *fixed(0.0))
        assert at_half > end(seed) + 0.2
        assert abs(at_half - at_none) < 0.25 * (at_half - end(seed))

    def test_the_bonus_has_the_papers_signs(self, seed):
        ends = [end(seed, "bonus", "", ("coefficient", c)) for c in (-0.001, 0.001)]
        assert ends[0] < end(seed) < ends[1]

    @pytest.mark.parametrize("recipe", [("par", "100%"), ("par_pi", "100%"), ("ada_ent_reg", "100%", ("step", 0.002))])
    def test_c6_a_target_within_reach_is_held(self, seed, recipe):
        run = trace(seed, *recipe, steps=200)
        late = [abs(entropy / run.entropy[0] - 1.0) for entropy in run.entropy[100:]]
        assert sum(late) / len(late) < 0.1
        assert abs(end(seed, *recipe, steps=200) - 1.0) < abs(end(seed, steps=200) - 1.0)


LEARNABLE = {"task": "learnable", "updates": 8, "steps": 150}


@pytest.mark.parametrize("seed", SEEDS)
class TestOnALearnableTask:
    def test_c10_a_fixed_bonus_collapses_or_explodes_within_a_decade(self, seed):
        assert end(seed, "bonus", "", ("coefficient", 0.003), **LEARNABLE) < 0.3
        assert end(seed, "bonus", "", ("coefficient", 0.03), **LEARNABLE) > 1.3

    def test_par_runs_out_of_authority_and_says_so(self, seed):
        """What the paper's Eq. 5 cannot do: negatives alone sink the entropy once there is something to learn."""
        run = trace(seed, "par", "50%", **LEARNABLE)
        assert run.value[-1] == 0.0
        assert run.entropy[-1] < 0.5 * run.entropy[0]
        assert run.alarms > 0
