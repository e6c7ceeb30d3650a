"""The demo's run on real SGLang servers: launched by the run itself, then asynchronous on a running one, and killed."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import DEMO, ROOT
from sglang_server import installation, shared_server

from megatron_rlvr.report import read_records

SMALL = (
    *("rollout.engine=sglang", "rollout.prompts=8", "rollout.samples_per_prompt=4", "objective.minibatches=2"),
    *("objective.epochs=1", "policy.micro_batch=8", "policy.learning_rate=2e-4", "run.checkpoint_every=1"),
    *("evaluation.prompts=8", "evaluation.samples=4"),
)
ASYNCHRONOUS = (
    *("rollout.max_staleness=1", "rollout.partial=true", "rollout.over_provision=1.5", "rollout.refills=2"),
    *("objective.mismatch=tis", "rollout.overlong=drop"),
)


def train(run, *overrides):
    return [*("train", DEMO), *SMALL, f"run.dir={run}", *overrides]


def test_the_demo_on_a_server_of_its_own(tmp_path, command):
    """Trainer and engine are two implementations: on the first step's tokens they agree to 1e-4 nats."""
    python = installation().python
    done = command(*train(tmp_path, "run.steps=2"), timeout=400.0, SGLANG_PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    first, second = read_records(tmp_path / "metrics.jsonl")
    assert first["rollout_trainer_gap_max"] < 1e-4
    assert second["rollout_trainer_gap_max"] < 1e-4  # after a resync
    assert first["staleness"] == second["staleness"] == 0
    assert len(read_records(tmp_path / "evaluations.jsonl")) == 2
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("transport", ["distributed", "tensor"])
def test_an_asynchronous_run_is_killed_and_goes_on(tmp_path, command, transport):
    server, client = shared_server()
    arguments = train(
        tmp_path, *ASYNCHRONOUS, "run.steps=5", f"rollout.urls={server.url}", f"rollout.transport={transport}"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_rlvr", *map(str, arguments)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(read_records(tmp_path / "metrics.jsonl")) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    done = command(*arguments, timeout=300.0)
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(5))
    assert all(0 <= record["staleness"] <= 1 for record in records)
    assert sum(record["staleness"] for record in records) > 0
    for record in records:
        assert record["reward_mean"] > 0  # eight groups, and most of them with right and wrong answers
        assert record["rollout_trainer_kl"] < 0.1
        assert record["mismatch_weight"] == pytest.approx(1.0, abs=0.1)
        # what is as old as the step's weights agrees as in a synchronous run
        assert record.get("rollout_trainer_kl/age_0", 0.0) < 1e-8
    client.flush_cache(10.0)  # nothing of ours runs there any more
