"""Starts the trainer ranks of one machine with torch's elastic launcher (what ``torchrun`` is)."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_rlvr.config import Config
from megatron_rlvr.core import RLVRError
from megatron_rlvr.data import open_prompts
from megatron_rlvr.policy.hf_weights import TensorReader, read_hf_config
from megatron_rlvr.policy.precision import check_precision
from megatron_rlvr.training.composition import compose_run


def preflight(config: Config) -> None:
    """Find in a second what every rank would find after loading everything.

    Raises:
        RLVRError: If the precision, the model directory, a prompt source, the recipe or the objective cannot be used.
    """
    check_precision(config.policy)
    read_hf_config(config.policy.model)
    TensorReader(config.policy.model)
    # any chat template shows whether the rows are sound
    prompts = open_prompts(config.data.train, chat_template=str)
    if config.data.heldout:
        open_prompts(config.data.heldout, chat_template=str)
    compose_run(config, len(prompts))


def launch(config_file: Path, processes: int) -> None:
    """Run ``processes`` trainer ranks on this machine until they end.

    Args:
        config_file: The resolved configuration in the run directory.
        processes: Number of ranks.

    Raises:
        RLVRError: With the sentence of the rank that failed first.
    """
    # One thread per rank unless the user says otherwise: more only fight each other for cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="megatron-rlvr-") as logs:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(settings, sys.executable)("-m", "megatron_rlvr", "train", str(config_file))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise RLVRError(_sentence(rank, failure.exitcode, failure.error_file_data)) from None
        except (SignalException, KeyboardInterrupt):
            raise RLVRError("interrupted; the same command resumes from the last checkpoint") from None


def _sentence(rank: int, exit_code: int, error_file: object) -> str:
    """What a failed rank wrote of itself, or else what its exit code says."""
    message = error_file.get("message") if isinstance(error_file, dict) else None
    text = str(message.get("message", "")) if isinstance(message, dict) else ""
    kind, _, sentence = text.partition(": ")
    if kind in ("RLVRError", "ConfigError"):
        return sentence
    if exit_code < 0:
        return f"rank {rank} was killed by signal {-exit_code}; the same command resumes from the last checkpoint"
    return f"rank {rank} failed with exit code {exit_code}, its traceback is above; please report it"
