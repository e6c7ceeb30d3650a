"""The whole loop as a user runs it: real ranks, real engine, real verifier, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEMO, ROOT
from safetensors.torch import load_file

from megatron_rlvr.report import read_records
from megatron_rlvr.verify import local_service

STEPS = 4
SMALL = (
    *(f"run.steps={STEPS}", "run.checkpoint_every=1", "rollout.prompts=8", "rollout.samples_per_prompt=4"),
    *("rollout.prompts_per_call=2", "objective.minibatches=2", "objective.epochs=1", "policy.micro_batch=4"),
    *(
        "policy.offload_optimizer=true",
        "policy.learning_rate=2e-4",
        "entropy.options.step=0.25",
        "evaluation.prompts=8",
        "evaluation.samples=4",
    ),
)
CLOCK = ("seconds/", "tokens_per_s")


def train(run, *overrides):
    return ["train", DEMO, *SMALL, f"run.dir={run}", *overrides]


def start(run, *overrides):
    """The same command, left running in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_rlvr", *map(str, train(run, *overrides))],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_steps(run, steps, process):
    while len(read_records(run / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def results(run):
    """Everything a run has computed: metrics without clocks, evaluations, exported weights."""
    metrics = [
        {name: value for name, value in record.items() if not name.startswith(CLOCK)}
        for record in read_records(run / "metrics.jsonl")
    ]
    return metrics, read_records(run / "evaluations.jsonl"), load_file(run / "model" / "model.safetensors")


def ranks_of(launcher):
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(launcher)], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in children.splitlines() if "megatron_rlvr train" in line]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, command):
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    done = command(*train(run))
    assert done.returncode == 0, done.stderr
    return run


def test_a_run_leaves_what_the_design_promises(uninterrupted):
    metrics, evaluations, weights = results(uninterrupted)
    assert [record["step"] for record in metrics] == list(range(STEPS))
    assert [record["step"] for record in evaluations] == [0, STEPS]
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == ["step_3", "step_4"]
    assert list((uninterrupted / "tensorboard").glob("events.*"))
    assert (uninterrupted / "config.yaml").exists()
    assert len(weights) == 35
    for record in metrics:
        # engine and trainer are two implementations of one model
        assert record["rollout_trainer_gap_max"] < 1e-4
        assert (record["grad_norm"] > 0) == (record["informative_share"] > 0)
        assert record["verdict/infra_error"] == 0


def test_lambda_follows_equation_5(uninterrupted):
    metrics, _, _ = results(uninterrupted)
    weight = 0.0
    for record in metrics:
        assert record["positive_weight"] == pytest.approx(weight)
        weight = min(1.0, max(0.0, weight + (0.25 if record["entropy"] >= 0.4 else -0.25)))
    assert len({record["positive_weight"] for record in metrics}) > 1


def test_a_finished_run_is_not_run_again(uninterrupted, command):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = command(*train(uninterrupted))
    assert done.returncode == 0
    assert "has all its 4 steps" in done.stdout
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_run_that_lost_its_verifier_and_then_a_rank_equals_the_uninterrupted_one(uninterrupted, tmp_path, command):
    run = tmp_path / "interrupted"
    with local_service() as url:
        process = start(run, f"verify.url={url}", "verify.deadline_s=2")
        wait_for_steps(run, 1, process)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    sentence = said.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    assert url in sentence
    assert "Traceback" not in said
    steps_before = len(read_records(run / "metrics.jsonl"))
    assert 1 <= steps_before < STEPS

    process = start(run)  # verify.* may change; this time with a verifier of its own
    wait_for_steps(run, steps_before + 1, process)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "was killed by signal 9; the same command resumes" in said.strip().splitlines()[-1]

    done = command(*train(run))
    assert done.returncode == 0, done.stderr
    metrics, evaluations, weights = results(run)
    expected_metrics, expected_evaluations, expected_weights = results(uninterrupted)
    assert metrics == expected_metrics
    assert evaluations == expected_evaluations
    assert all(weights[name].equal(tensor) for name, tensor in expected_weights.items())


def test_data_parallel_draws_the_same_samples_and_the_same_lambda(uninterrupted, tmp_path, command):
    run = tmp_path / "data-parallel"
    done = command(*train(run, "policy.tensor_parallel=1", "policy.data_parallel=2", "policy.micro_batch=2"))
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(results(run)[0], results(uninterrupted)[0], strict=True):
        for name in ("positive_weight", "reward_mean", "response_tokens", "epoch"):
            assert ours[name] == theirs[name], (name, ours["step"])
        for name in ("entropy", "grad_norm", "approx_kl", "policy_entropy", "positive_fraction"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-7), (name, ours["step"])


def test_a_damaged_checkpoint_is_refused(uninterrupted, tmp_path, command):
    run = tmp_path / "damaged"
    subprocess.run(["cp", "-r", uninterrupted, run], check=True)
    (run / "model" / "model.safetensors").unlink()  # or the run would count as finished
    weights = max((run / "checkpoints" / "step_4" / "policy").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    done = command(*train(run))
    assert done.returncode == 2
    assert "step_4 is damaged" in done.stderr
    assert "to resume from" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.stepz=3"], "did you mean 'run.steps'"),
        (["policy.model=/no/such/model"], "/no/such/model has no config.json"),
        (["data.train=countdown:trian"], "countdown:train"),
        (["data.train=/no/such/file.jsonl"], "/no/such/file.jsonl"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_written(tmp_path, command, overrides, said):
    done = command(*train(tmp_path / "run", *overrides))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_torchrun_starts_a_run_as_the_launcher_does(tmp_path, command, uninterrupted):
    run = tmp_path / "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command_line = [*torchrun, "-m", "megatron_rlvr", *map(str, train(run, "run.steps=1"))]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (run / "config.yaml").exists()
    assert results(run)[0][0] == {**results(uninterrupted)[0][0]}


def test_a_wrong_number_of_processes_is_refused(tmp_path, command):
    done = command(*train(tmp_path / "run"), RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert done.returncode == 2
    assert "1 trainer processes were started for policy.tensor_parallel=2" in done.stderr


def test_the_evaluation_of_the_base_model_is_recorded_as_json(uninterrupted):
    first = json.loads(Path(uninterrupted / "evaluations.jsonl").read_text().splitlines()[0])
    assert first["prompts"] == 8
    assert set(first["pass_at_k"]) == {"1", "2", "4"}
