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

RECIPES = ("none", "par", "par_stage", "par_epoch")
ENGINES = ("embedded",)
PRECISIONS = ("fp32", "bf16")
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
    prompts_per_call: int = _key(16, "prompts that one generate call of the embedded engine takes")


@dataclass(frozen=True)
class PolicyConfig:
    """The trained model and its parallel layout."""

    model: str = _key(_REQUIRED, "Hugging Face model directory (config.json, *.safetensors, tokenizer)")
    tensor_parallel: int = _key(1, "ranks that share one copy of the model")
    data_parallel: int = _key(1, "copies of the model; ranks = tensor_parallel x data_parallel")
    precision: str = _key("fp32", f"one of {', '.join(PRECISIONS)}")
    micro_batch: int = _key(8, "rows per forward pass of one data-parallel rank")
    learning_rate: float = _key(1e-6, "peak learning rate of Adam")
    lr_schedule: str = _key("cosine", f"one of {', '.join(LR_SCHEDULES)}; cosine falls to 0 at the last step")
    megatron: dict[str, Any] = _key({}, "passed to Megatron-Core's TransformerConfig, OptimizerConfig or DDP config")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The clipped policy-gradient objective (token-mean over the global batch) and its off-policy updates."""

    clip_low: float = _key(0.2, "the ratio is clipped from below at 1 - clip_low")
    clip_high: float = _key(0.2, "the ratio is clipped from above at 1 + clip_high")
    minibatches: int = _key(4, "optimizer updates per pass over a rollout batch (N of the paper)")
    epochs: int = _key(1, "passes over a rollout batch")


@dataclass(frozen=True)
class EntropyConfig:
    """Entropy control: which recipe sets the weight of positive-advantage tokens."""

    recipe: str = _key("par", f"one of {', '.join(RECIPES)}; none is plain GRPO")
    target: float = _key(0.2, "entropy (nats per token) that par steers to")
    step: float = _key(0.05, "change of the positive weight per step under par")
    initial: float = _key(0.0, "positive weight of the first step under par")


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
        return self.policy.tensor_parallel * self.policy.data_parallel


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
    names = {"int": "a whole number", "float": "a number", "str": "text", "dict[str, Any]": "a mapping"}
    return names[_types()[key]]


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
        *("rollout.temperature", "rollout.prompts_per_call", "policy.tensor_parallel", "policy.data_parallel"),
        *("policy.micro_batch", "policy.learning_rate", "objective.minibatches", "objective.epochs", "entropy.step"),
        *("verify.deadline_s", "evaluation.prompts", "evaluation.samples"),
    )
    for key in positive:
        if not (_get(config, key) > 0 and math.isfinite(_get(config, key))):
            raise ConfigError(f"{key} is {_get(config, key)}; it has to be above 0")
    bounded = {
        "objective.clip_low": (0.0, 1.0),
        "objective.clip_high": (0.0, math.inf),
        "entropy.target": (0.0, math.inf),
        "entropy.step": (0.0, 1.0),
        "entropy.initial": (0.0, 1.0),
        "verify.max_infra_error_share": (0.0, 1.0),
        "evaluation.every": (0, math.inf),
        "run.seed": (0, 2**31),
    }
    for key, (low, high) in bounded.items():
        if not low <= _get(config, key) <= high:
            raise ConfigError(f"{key} is {_get(config, key)}; it has to lie between {low} and {high}")
    choices = {
        "rollout.engine": ENGINES,
        "policy.precision": PRECISIONS,
        "policy.lr_schedule": LR_SCHEDULES,
        "entropy.recipe": RECIPES,
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
    if config.evaluation.every and not config.data.heldout:
        raise ConfigError(f"evaluation.every={config.evaluation.every} needs data.heldout; name its prompts there")
