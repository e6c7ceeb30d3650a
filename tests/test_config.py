import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr import config as configuration
from megatron_rlvr.config import Config, ConfigError, config_keys, differences, load_config, save_config
from megatron_rlvr.entropy import RECIPES, EntropyGuided, RunPlan, SignalKind, build_recipe
from megatron_rlvr.objective import AGGREGATIONS, ESTIMATORS, MISMATCHES
from megatron_rlvr.objective.kl import KL_ESTIMATORS
from megatron_rlvr.objective.settings import SURROGATE_NAMES

REQUIRED = ("run.dir=r", "data.train=countdown:train", "policy.model=m")

# Adding, renaming or removing a key is a decision: it changes this list, the README and the CHANGELOG.
KEYS = """
run.dir run.steps run.seed run.checkpoint_every run.async_checkpoint run.checkpoints_kept
data.train data.heldout
rollout.engine rollout.prompts rollout.samples_per_prompt rollout.max_new_tokens rollout.temperature
rollout.refills rollout.over_provision rollout.max_staleness rollout.partial rollout.overlong rollout.overlong_buffer
rollout.prompts_per_call rollout.servers rollout.urls rollout.min_servers rollout.router rollout.transport
rollout.bucket_mib rollout.trainer_address rollout.sglang
policy.model policy.tensor_parallel policy.sequence_parallel policy.pipeline_parallel policy.virtual_pipeline
policy.context_parallel policy.data_parallel policy.precision policy.micro_batch policy.micro_batch_tokens
policy.offload_optimizer policy.learning_rate policy.lr_schedule policy.megatron
objective.advantages objective.advantage_options objective.whiten objective.mismatch objective.mismatch_options
objective.surrogate objective.surrogate_options objective.clip_low objective.clip_high objective.kl
objective.kl_estimator objective.aggregation objective.minibatches objective.epochs
entropy.recipe entropy.target entropy.signal entropy.ema entropy.options entropy.alarm_after entropy.fallback_after
entropy.fallback_high
verify.url verify.deadline_s verify.max_infra_error_share
evaluation.every evaluation.prompts evaluation.samples
""".split()  # noqa: SIM905 - one section per line


def test_the_key_list_is_frozen():
    assert list(config_keys()) == KEYS


def test_the_names_are_those_of_the_rooms():
    """The configuration, which must not import torch, spells them out."""
    assert sorted(configuration.RECIPES) == sorted(RECIPES)
    assert get_args(SignalKind) == configuration.SIGNALS
    assert tuple(ESTIMATORS) == configuration.ESTIMATORS
    assert sorted(SURROGATE_NAMES) == sorted(configuration.SURROGATES)
    assert AGGREGATIONS == configuration.AGGREGATIONS
    assert tuple(KL_ESTIMATORS) == configuration.KL_ESTIMATORS
    assert ("none", *MISMATCHES) == configuration.MISMATCHES


def test_every_key_is_explained():
    assert all(entry.metadata["help"] for entry in config_keys().values())


def test_the_defaults_are_the_papers_settings():
    config = load_config(None, REQUIRED)
    assert (config.rollout.prompts, config.rollout.samples_per_prompt, config.rollout.temperature) == (256, 16, 1.0)
    assert (config.objective.minibatches, config.objective.epochs) == (4, 1)
    assert (config.objective.clip_low, config.objective.clip_high) == (0.2, 0.2)
    assert (config.entropy.recipe, config.entropy.target, config.entropy.options) == ("par", "", {})
    recipe = build_recipe("par", RunPlan(total_steps=400, steps_per_epoch=68))
    guided = EntropyGuided(target=0.2, step_size=0.05, initial=0.0)
    assert recipe.control.controller.state_dict() == guided.state_dict()
    assert (config.policy.learning_rate, config.policy.lr_schedule) == (1e-6, "cosine")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.step=3", "there is no key 'run.step'; did you mean 'run.steps'"),
        ("rollout.temprature=2", "did you mean 'rollout.temperature'"),
        ("micro_batch_size=3", "did you mean 'policy.micro_batch'"),
        ("runs.steps=3", "did you mean 'run.steps'"),
        ("run.steps.more=3", "run.steps"),
        ("run=3", "run is a section; set one of its keys"),
        ("run.steps", "is not key=value"),
        ("=3", "is not key=value"),
        ("run.dir=", "run.dir is empty"),
        ("run.steps=many", "run.steps: Value 'many' of type 'str' could not be converted to Integer; it takes a whole"),
        ("run.steps=1.5", "it takes a whole number"),
        ("run.steps=0", "run.steps is 0; it has to be above 0"),
        ("policy.learning_rate=fast", "it takes a number"),
        ("policy.megatron=3", "it takes a mapping"),
        ("data.train=null", "it takes text"),
        ("rollout.temperature=nan", "rollout.temperature is nan; it has to be above 0"),
        ("rollout.temperature=inf", "rollout.temperature is inf"),
        ("objective.clip_low=1.5", "objective.clip_low is 1.5; it has to lie between 0.0 and 1.0"),
        ("entropy.ema=-1", "entropy.ema is -1"),
        ("entropy.recipe=part", "it is one of none, par, par_pi, par_stage"),
        ("entropy.recipe=part", "(nearest: par)"),
        ("objective.surrogate=pppo", "(nearest: ppo)"),
        ("policy.precision=fp64", "it is one of fp32, bf16"),
        ("rollout.over_provision=1.5", "needs servers whose stragglers it can abort; set rollout.engine=sglang"),
        ("rollout.over_provision=0.5", "rollout.over_provision is 0.5; it has to lie between 1.0 and inf"),
        ("rollout.partial=true", "rollout.partial=true needs servers"),
        ("rollout.overlong=penalize", "penalize needs a buffer, such as a fifth of rollout.max_new_tokens"),
        ("rollout.overlong_buffer=5", "rollout.overlong=keep and rollout.overlong_buffer=5 do not go together"),
        ("rollout.overlong_buffer=5000", "it has to lie between 0 and 4096"),
        ("rollout.engine=vllm", "it is one of embedded, sglang"),
        ("objective.minibatches=3", "rollout.prompts=256 does not split into objective.minibatches=3"),
        ("rollout.samples_per_prompt=1", "needs at least 2"),
        ("policy.data_parallel=3", "does not split over policy.data_parallel=3"),
        ("policy.sequence_parallel=true", "needs policy.tensor_parallel above 1"),
        ("policy.virtual_pipeline=2", "set policy.pipeline_parallel above 1 or policy.virtual_pipeline=1"),
        ("evaluation.every=5", "needs data.heldout"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(override, said):
    with pytest.raises(ConfigError) as error:
        load_config(None, [*REQUIRED, override])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", REQUIRED)
def test_a_required_value_is_asked_for(missing):
    with pytest.raises(ConfigError, match=missing.partition("=")[0] + " has no value"):
        load_config(None, [value for value in REQUIRED if value != missing])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "holds a list or a scalar"),
        ("run: [", "cannot be read as YAML"),
        ("run:\n  stepz: 3\n", "did you mean 'run.steps'"),
        ("\xff\xfe", "cannot be read"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=said):
        load_config(path, REQUIRED)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_config(tmp_path / "none.yaml")


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {dir: r, steps: 7, seed: 5}\ndata: {train: t}\npolicy: {model: m, megatron: {clip_grad: 0.5}}\n"
    )
    config = load_config(path, ["run.steps=9", "policy.megatron.adam_beta2=0.95"])
    assert (config.run.steps, config.run.seed, config.run.checkpoint_every) == (9, 5, 20)
    assert config.policy.megatron == {"clip_grad": 0.5, "adam_beta2": 0.95}


@settings(max_examples=15)
@given(
    steps=st.integers(1, 10**6),
    rate=st.floats(1e-9, 1.0),
    directory=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20).filter(
        lambda text: "${" not in text and text != "???"
    ),
)
def test_a_saved_configuration_reads_back_equal(tmp_path_factory, steps, rate, directory):
    config = load_config(None, REQUIRED)
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, steps=steps, dir=directory),
        policy=dataclasses.replace(config.policy, learning_rate=rate, megatron={"clip_grad": rate, "a": [1, "x"]}),
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert differences(config, load_config(path, ["run.seed=77"])) == ["run.seed"]


def test_a_text_can_be_emptied(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: t, heldout: h}\nrun: {dir: r}\npolicy: {model: m}\n")
    assert load_config(path, ["data.heldout="]).data.heldout == ""


def test_the_configuration_is_frozen():
    config = load_config(None, REQUIRED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.steps = 3


def test_the_examples_are_valid():
    folder = Path(__file__).parent.parent / "examples"
    examples = [path for path in folder.rglob("*.yaml") if folder / "sandbox" not in path.parents]
    assert examples
    for path in examples:
        assert isinstance(load_config(path), Config)


def test_importing_the_configuration_does_not_import_torch():
    code = "import sys, megatron_rlvr.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
