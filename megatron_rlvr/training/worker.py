"""One trainer rank, in a process that torchrun, srun or `launch` started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from functools import partial

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
    _end_with_the_parent()
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


def _end_with_the_parent() -> None:
    """Have the kernel end this rank with torch's launcher, and forked children, Megatron's checkpoint writers, with it.

    Left alone, ranks would go on writing into a run directory that the next launcher resumes from, and a writer would
    wait for its dead parent for good and keep the verifier's and the launcher's pipes open.
    """
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        end_with_parent = partial(prctl, 1, signal.SIGKILL)  # PR_SET_PDEATHSIG of prctl(2)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a shell that started this rank may well end before it
            end_with_parent()
        os.register_at_fork(after_in_child=end_with_parent)
