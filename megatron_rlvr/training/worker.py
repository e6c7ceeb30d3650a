"""One trainer rank, in a process that torchrun, srun or `launch` started."""

from __future__ import annotations

import os
import sys
import warnings

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megatron_rlvr.config import Config, ConfigError
from megatron_rlvr.core import RLVRError

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def is_rank() -> bool:
    """Whether this process is one of several started from outside: by torchrun, or by srun with MASTER_ADDR set."""
    return "RANK" in os.environ or ("SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ)


def run_rank(config: Config) -> int:
    """Run this rank to the end of the training; the process's exit code.

    An error that the user can mend becomes one sentence: in the launcher's error file where there is one, else on
    stderr. Any other exception propagates with its traceback.
    """
    for name, slurm in _SLURM.items():
        if slurm in os.environ:
            os.environ.setdefault(name, os.environ[slurm])
    warnings.filterwarnings("ignore", module="megatron")  # of optional packages that a CPU machine never has
    handler = get_error_handler()
    handler.initialize()
    try:
        from megatron_rlvr.policy import cpu_runtime

        cpu_runtime.install()  # before anything else imports Megatron-Core
        from megatron_rlvr.training.trainer import Trainer

        with Trainer(config) as trainer:
            trainer.run()
    except (RLVRError, ConfigError) as error:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            handler.record_exception(error)
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
