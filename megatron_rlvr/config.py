"""The whole configuration, typed and frozen. Importable without torch.

The defaults are the settings of Jin et al. (arXiv:2511.05993) where the paper states them: 256 prompts x 16 samples,
4 updates per rollout batch, clip 0.2/0.2, entropy target 0.2 with step 0.05, learning rate 1e-6 with cosine decay.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

RECIPES = (
    *("none", "par", "par_pi", "par_stage", "par_epoch", "schedule", "fixed", "w_reinforce", "nsr", "psr"),
    *("ada_ent_reg", "bonus", "siren", "entropic", "entrocraft", "stare", "temperature_pi"),
    *("clip_higher", "gppo", "clip_cov", "kl_cov", "rand_pos_clip", "top_entropy", "entropy_advantage", "asym_grpo"),
    *("a3po", "steer", "repo_r"),
)
SIGNALS = ("rollout", "policy", "sequence", "nucleus")
ESTIMATORS = (
    *("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "pass_at_k", "unlikeliness", "outcome"),
    "asym_grpo",
)
SURROGATES = ("ppo", "cispo", "gspo", "gppo", "none")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")
MISMATCHES = ("none", "tis", "icepop", "mis_token", "mis_sequence", "mis_geometric")
OVERLONG = ("keep", "drop", "penalize")
ENGINES = ("embedded", "sglang")
TRANSPORTS = ("tensor", "disk", "distributed")
PRECISIONS = ("fp32", "bf16", "fp8")
# Keys of `PolicyConfig` that say which rank computes what and in which order; the numbers depend on them by rounding.
LAYOUT = (
    *("tensor_parallel", "sequence_parallel", "pipeline_parallel", "virtual_pipeline", "context_parallel"),
    *("data_parallel", "micro_batch", "micro_batch_tokens"),
)
# The same of `PolicyConfig.megatron`: pipelines that Megatron-Core does not cut into equal parts.
PIPELINE_SPLIT = (
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
)
LR_SCHEDULES = ("constant", "cosine")
_REQUIRED = "???"  # OmegaConf's mark of a value that has to be given


class ConfigError(Exception):
    """A configuration that cannot be run; the text names the key, the value and the mend."""


def _key(default: Any, help: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how long it is."""

    dir: str = _key(_REQUIRED, "run directory; an existing one is resumed from its last checkpoint")
    steps: int = _key(400, "rollout steps")
    seed: int = _key(0, "fixes prompt order, sampling and mini-batches, whatever the layout")
    checkpoint_every: int = _key(20, "steps between checkpoints; the last step is always saved")
    async_checkpoint: bool = _key(False, "write checkpoints in the background, from a copy of the state in host memory")
    checkpoints_kept: int = _key(2, "older checkpoints are removed")


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from: ``countdown:train``, ``countdown:heldout``, or a ``.jsonl``/``.parquet`` file."""

    train: str = _key(_REQUIRED, "training prompts")
    heldout: str = _key("", "held-out prompts for the evaluation; empty for none")


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are drawn."""

    engine: str = _key("embedded", f"one of {', '.join(ENGINES)}")
    prompts: int = _key(256, "prompts per step")
    samples_per_prompt: int = _key(16, "responses per prompt, the group of GRPO")
    max_new_tokens: int = _key(4096, "longest response in tokens")
    temperature: float = _key(1.0, "of the sampling, the log-probs and the entropy alike")
    refills: int = _key(0, "dynamic sampling: how often groups all right or all wrong are replaced by new prompts")
    over_provision: float = _key(1.0, "prompts drawn per prompt wanted; the first to finish count, the rest come back")
    max_staleness: int = _key(0, "steps that a batch may be begun early, beside the updates; 0 is synchronous")
    partial: bool = _key(False, "responses go on across a resync, each token with its version; else they start over")
    overlong: str = _key("keep", f"what becomes of truncated responses: one of {', '.join(OVERLONG)}")
    overlong_buffer: int = _key(0, "for penalize: the last tokens of max_new_tokens, over which the reward falls by 1")
    prompts_per_call: int = _key(16, "prompts that one generate call of the embedded engine takes")
    servers: int = _key(1, "SGLang servers to launch on this machine, unless urls names running ones")
    urls: str = _key("", "addresses of running SGLang servers, separated by commas; empty launches servers")
    min_servers: int = _key(1, "the run stops in words with fewer serving")
    router: bool = _key(False, "put an sglang-router in front of the servers")
    transport: str = _key("distributed", f"how weights reach the servers: one of {', '.join(TRANSPORTS)}")
    bucket_mib: int = _key(256, "weights that travel at a time")
    trainer_address: str = _key("127.0.0.1", "address of rank 0 that servers can reach, for transport=distributed")
    sglang: dict[str, Any] = _key({}, "passed to the launched servers as SGLang's own flags")


@dataclass(frozen=True)
class PolicyConfig:
    """The trained model and its parallel layout."""

    model: str = _key(_REQUIRED, "Hugging Face model directory (config.json, *.safetensors, tokenizer)")
    tensor_parallel: int = _key(1, "ranks that share every layer")
    sequence_parallel: bool = _key(False, "tensor-parallel ranks share the activations between their layers, too")
    pipeline_parallel: int = _key(1, "stages that the layers are split over")
    virtual_pipeline: int = _key(1, "chunks of layers on each stage; above 1 their schedule is interleaved")
    context_parallel: int = _key(1, "ranks that share every sequence")
    data_parallel: int = _key(1, "copies; ranks = tensor x pipeline x context x data_parallel")
    precision: str = _key("fp32", f"one of {', '.join(PRECISIONS)}; policy.megatron.fp8_recipe chooses a scaling")
    micro_batch: int = _key(8, "most rows per forward pass of one data-parallel rank")
    micro_batch_tokens: int = _key(0, "most tokens per forward pass, rows packed; 0 pads micro_batch rows instead")
    offload_optimizer: bool = _key(False, "keep the optimizer's state on the host between the updates of two steps")
    learning_rate: float = _key(1e-6, "peak learning rate of Adam")
    lr_schedule: str = _key("cosine", f"one of {', '.join(LR_SCHEDULES)}; cosine falls to 0 at the last step")
    megatron: dict[str, Any] = _key({}, "passed to Megatron-Core's TransformerConfig, OptimizerConfig or DDP config")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The policy-gradient objective, in the order of composition, and its off-policy updates."""

    advantages: str = _key("", f"one of {', '.join(ESTIMATORS)}; empty: what the recipe needs, else grpo")
    advantage_options: dict[str, Any] = _key({}, "options of that estimator, such as k of pass_at_k")
    whiten: bool = _key(False, "normalise advantages over the batch's tokens before their sign is decided")
    mismatch: str = _key("none", f"weight of trainer over engine probability: one of {', '.join(MISMATCHES)}")
    mismatch_options: dict[str, Any] = _key({}, "options of that correction, such as its bounds")
    surrogate: str = _key("", f"one of {', '.join(SURROGATES)}; empty: what the recipe needs, else ppo")
    surrogate_options: dict[str, Any] = _key({}, "options of the loss, such as dual_clip or opsm")
    clip_low: float = _key(0.2, "the ratio is clipped from below at 1 - clip_low")
    clip_high: float = _key(0.2, "the ratio is clipped from above at 1 + clip_high")
    kl: float = _key(0.0, "coefficient of the KL divergence to the model that training started from; 0 for none")
    kl_estimator: str = _key("k3", f"one of {', '.join(KL_ESTIMATORS)}")
    aggregation: str = _key(
        "token_mean", f"over the global mini-batch: one of {', '.join(AGGREGATIONS)} (length: rollout.max_new_tokens)"
    )
    minibatches: int = _key(4, "optimizer updates per pass over a rollout batch (N of the paper)")
    epochs: int = _key(1, "passes over a rollout batch")


@dataclass(frozen=True)
class EntropyConfig:
    """Entropy control: a recipe names signal, controller and actuator."""

    recipe: str = _key("par", f"one of {', '.join(RECIPES)}; none is plain GRPO")
    target: str = _key(
        "",
        "nats per token ('0.2'), share of the first step's ('75%'), or a way between ('0.5 -> 0.2'); empty: recipe's",
    )
    signal: str = _key("", f"entropy that steers: one of {', '.join(SIGNALS)}; empty: the recipe's, mostly rollout")
    ema: float = _key(0.0, "share of the past in the smoothed signal; 0 for none")
    options: dict[str, Any] = _key({}, "options of the recipe, see docs/entropy.md")
    alarm_after: int = _key(20, "steps at a bound with the entropy on the wrong side until the log says so")
    fallback_after: int = _key(0, "such steps until an adaptive entropy bonus helps; 0 for never")
    fallback_high: float = _key(0.005, "largest coefficient of that bonus")


@dataclass(frozen=True)
class VerifyConfig:
    """The verifier service."""

    url: str = _key("", "address of the service, or of its replicas separated by commas; empty starts one for the run")
    deadline_s: float = _key(60.0, "every response is judged or given up within this many seconds")
    max_infra_error_share: float = _key(0.1, "above this share of unjudged responses the run stops")


@dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on held-out prompts, before the first and after the last step and in between."""

    every: int = _key(0, "steps between evaluations; 0 evaluates only at the start and the end")
    prompts: int = _key(128, "held-out prompts")
    samples: int = _key(16, "responses per held-out prompt")


@dataclass(frozen=True)
class Config:
    """A complete configuration; building one checks it."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        """Refuse values and combinations that cannot run."""
        _check_ranges(self)
        _check_combinations(self)

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        policy = self.policy
        return policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel * policy.data_parallel


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Merge defaults, the YAML file at ``path`` and ``key=value`` overrides, in this order.

    Raises:
        ConfigError: On a missing file, bad YAML, an unknown key, a wrong type, a missing value or an impossible
            combination; the text names the key, the value and the mend.
    """
    layers = [OmegaConf.structured(Config)]
    OmegaConf.set_readonly(layers[0], False)
    if path is not None:
        layers.append(_read_yaml(Path(path)))
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not equals or not name:
            raise ConfigError(f"override '{override}' is not key=value; write for example run.steps=100")
    # 'key=' means empty text, where YAML would read nothing at all
    layers.append(OmegaConf.from_dotlist([f'{text}""' if text.endswith("=") else text for text in overrides]))
    for layer in layers[1:]:
        _refuse_unknown(layer)
    try:
        for section in layers[0].values():
            OmegaConf.set_readonly(section, False)
        config = OmegaConf.to_object(OmegaConf.merge(*layers))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; set it in the YAML file or as {error.full_key}=…") from None
    except ConfigKeyError as error:
        raise _unknown_key(str(error.full_key)) from None
    except OmegaConfBaseException as error:
        wanted = f"; it takes {_type_name(error.full_key)}" if error.full_key in _types() else ""
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}{wanted}") from None
    assert isinstance(config, Config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to an equal object."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def config_keys() -> dict[str, dataclasses.Field[Any]]:
    """Every dotted key with its dataclass field, in order."""
    return dict(_fields())


def differences(old: Config, new: Config) -> list[str]:
    """Dotted keys whose values differ."""
    return [key for key in config_keys() if _get(old, key) != _get(new, key)]


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _fields() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for section in dataclasses.fields(Config):
        assert callable(section.default_factory)
        for entry in dataclasses.fields(section.default_factory):  # type: ignore[arg-type]
            yield f"{section.name}.{entry.name}", entry


def _types() -> dict[str, str]:
    return {key: str(entry.type) for key, entry in _fields()}


def _type_name(key: str) -> str:
    names = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
    return names.get(_types()[key], "a mapping")


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}; see examples/countdown/ for one") from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds a list or a scalar; it has to hold sections such as 'run:' and 'policy:'")
    return loaded


def _refuse_unknown(layer: DictConfig) -> None:
    sections = {section.name for section in dataclasses.fields(Config)}
    known = config_keys()
    for key, values in layer.items():
        section = str(key)
        if section not in sections:
            inner = [f".{name!s}" for name in values] if isinstance(values, DictConfig) else []
            raise _unknown_key(section + "".join(inner[:1]))
        if not isinstance(values, DictConfig):
            raise ConfigError(f"{section} is a section; set one of its keys, such as {_nearest(section)}")
        for name in map(str, values):
            if f"{section}.{name}" not in known:
                raise _unknown_key(f"{section}.{name}")


def _unknown_key(key: str) -> ConfigError:
    return ConfigError(f"there is no key '{key}'; did you mean '{_nearest(key)}'? (megatron-rlvr keys lists all)")


def _nearest(key: str) -> str:
    candidates = list(config_keys())
    by_name = difflib.get_close_matches(key.rpartition(".")[2], [name.split(".")[1] for name in candidates], 1, 0.8)
    same_section = [name for name in candidates if name.startswith(key.split(".")[0] + ".")]
    close = difflib.get_close_matches(key, candidates, 1, 0.75)
    if close:
        return close[0]
    if by_name:
        return next(name for name in candidates if name.endswith("." + by_name[0]))
    return difflib.get_close_matches(key, same_section or candidates, 1, 0.0)[0]


def _check_ranges(config: Config) -> None:
    for key in ("run.dir", "data.train", "policy.model"):
        if not _get(config, key):
            raise ConfigError(f"{key} is empty; set it in the YAML file or as {key}=…")
    positive = (
        *("run.steps", "run.checkpoint_every", "run.checkpoints_kept", "rollout.prompts", "rollout.max_new_tokens"),
        *("rollout.temperature", "rollout.prompts_per_call", "rollout.servers", "rollout.min_servers"),
        *("rollout.bucket_mib", "policy.tensor_parallel", "policy.data_parallel"),
        *("policy.pipeline_parallel", "policy.virtual_pipeline", "policy.context_parallel"),
        *("policy.micro_batch", "policy.learning_rate", "objective.minibatches", "objective.epochs"),
        *("entropy.alarm_after", "entropy.fallback_high"),
        *("verify.deadline_s", "evaluation.prompts", "evaluation.samples"),
    )
    for key in positive:
        if not (_get(config, key) > 0 and math.isfinite(_get(config, key))):
            raise ConfigError(f"{key} is {_get(config, key)}; it has to be above 0")
    bounded = {
        "objective.clip_low": (0.0, 1.0),
        "objective.clip_high": (0.0, math.inf),
        "objective.kl": (0.0, math.inf),
        "rollout.refills": (0, math.inf),
        "rollout.over_provision": (1.0, math.inf),
        "rollout.max_staleness": (0, math.inf),
        "rollout.overlong_buffer": (0, config.rollout.max_new_tokens),
        "entropy.ema": (0.0, 1.0),
        "entropy.fallback_after": (0, math.inf),
        "verify.max_infra_error_share": (0.0, 1.0),
        "evaluation.every": (0, math.inf),
        "policy.micro_batch_tokens": (0, math.inf),
        "run.seed": (0, 2**31),
    }
    for key, (low, high) in bounded.items():
        if not low <= _get(config, key) <= high:
            raise ConfigError(f"{key} is {_get(config, key)}; it has to lie between {low} and {high}")
    choices = {
        "rollout.engine": ENGINES,
        "rollout.overlong": OVERLONG,
        "rollout.transport": TRANSPORTS,
        "policy.precision": PRECISIONS,
        "policy.lr_schedule": LR_SCHEDULES,
        "objective.advantages": ("", *ESTIMATORS),
        "objective.mismatch": MISMATCHES,
        "objective.surrogate": ("", *SURROGATES),
        "objective.kl_estimator": KL_ESTIMATORS,
        "objective.aggregation": AGGREGATIONS,
        "entropy.recipe": RECIPES,
        "entropy.signal": ("", *SIGNALS),
    }
    for key, allowed in choices.items():
        if _get(config, key) not in allowed:
            near = difflib.get_close_matches(_get(config, key), allowed, 1, 0.0)[0]
            raise ConfigError(f"{key} is '{_get(config, key)}'; it is one of {', '.join(allowed)} (nearest: {near})")


def _check_combinations(config: Config) -> None:
    rollout, objective, policy = config.rollout, config.objective, config.policy
    if rollout.samples_per_prompt < 2:
        raise ConfigError(
            f"rollout.samples_per_prompt is {rollout.samples_per_prompt}; GRPO compares the samples of one prompt and "
            "needs at least 2"
        )
    if rollout.prompts % objective.minibatches:
        raise ConfigError(
            f"rollout.prompts={rollout.prompts} does not split into objective.minibatches={objective.minibatches}; "
            "make the first a multiple of the second"
        )
    rows = rollout.prompts // objective.minibatches * rollout.samples_per_prompt
    if rows % policy.data_parallel:
        raise ConfigError(
            f"a mini-batch of {rows} rows (rollout.prompts / objective.minibatches x rollout.samples_per_prompt) does "
            f"not split over policy.data_parallel={policy.data_parallel}; make it a multiple"
        )
    _check_layout(policy, rows)
    _check_collection(rollout)
    if config.evaluation.every and not config.data.heldout:
        raise ConfigError(f"evaluation.every={config.evaluation.every} needs data.heldout; name its prompts there")


def _check_collection(rollout: RolloutConfig) -> None:
    if rollout.engine == "embedded":
        if rollout.over_provision > 1.0:
            raise ConfigError(
                f"rollout.over_provision={rollout.over_provision} needs servers whose stragglers it can abort; set "
                "rollout.engine=sglang or rollout.over_provision=1"
            )
        if rollout.partial:
            raise ConfigError(
                "rollout.partial=true needs servers that generate beside the updates; set rollout.engine=sglang or "
                "rollout.partial=false"
            )
    if (rollout.overlong == "penalize") != (rollout.overlong_buffer > 0):
        raise ConfigError(
            f"rollout.overlong={rollout.overlong} and rollout.overlong_buffer={rollout.overlong_buffer} do not go "
            "together; penalize needs a buffer, such as a fifth of rollout.max_new_tokens, and the others need 0"
        )


def _check_layout(policy: PolicyConfig, rows: int) -> None:
    if policy.sequence_parallel and policy.tensor_parallel == 1:
        raise ConfigError(
            "policy.sequence_parallel=true needs policy.tensor_parallel above 1, whose ranks it splits sequences over; "
            "set it to false"
        )
    if policy.virtual_pipeline == 1:
        return
    if policy.pipeline_parallel == 1:
        raise ConfigError(
            f"policy.virtual_pipeline={policy.virtual_pipeline} interleaves the stages of a pipeline; set "
            "policy.pipeline_parallel above 1 or policy.virtual_pipeline=1"
        )
    if rows // policy.data_parallel < policy.pipeline_parallel:
        raise ConfigError(
            f"policy.virtual_pipeline={policy.virtual_pipeline} needs a micro-batch for each of the "
            f"{policy.pipeline_parallel} stages, but a mini-batch has {rows // policy.data_parallel} rows per "
            "data-parallel rank; raise rollout.prompts or lower policy.pipeline_parallel"
        )
