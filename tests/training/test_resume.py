"""A run that was killed in every phase, and one that was not: equal bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT
from safetensors.torch import load_file

from megatron_rlvr.report import read_records
from megatron_rlvr.verify import local_service

STEPS = 5
TINY = (
    *(f"run.steps={STEPS}", "run.checkpoint_every=2", "rollout.prompts=4", "rollout.samples_per_prompt=4"),
    *("rollout.prompts_per_call=2", "objective.minibatches=2", "objective.epochs=1", "policy.micro_batch=4"),
    *("policy.learning_rate=2e-4", "evaluation.prompts=2", "evaluation.samples=2", "objective.kl=0.01"),
    # a controller with every kind of state: a signal of the last step, smoothed, a target of the first, a fallback
    *("entropy.signal=policy", "entropy.ema=0.5", "entropy.target=150%", "entropy.fallback_after=1"),
    *("entropy.recipe=par_pi", "entropy.options.deadband=0.001"),
    # a batch that waits to be trained on, and prompts that its refill took
    *("rollout.max_staleness=1", "rollout.refills=1", "objective.mismatch=tis"),
)
LAYOUTS = {
    "tp2": ("policy.tensor_parallel=2",),
    "pp2": (
        *("policy.tensor_parallel=1", "policy.pipeline_parallel=2"),
        "policy.megatron.num_layers_in_first_pipeline_stage=1",
    ),
}
# (place, step, rank): where each life of the run ends. Checkpoints follow steps 1, 3 and 4, counted from 0.
DEATHS = (
    *(("rollout", 1, 1), ("saving", 1, 1), ("prepare", 1, 0)),
    *(("verify", 2, 0), ("update", 3, 1), ("commit", 3, 0), ("resync", 3, 1)),
    *(("report", 4, 0), ("pruning", 4, 0)),
)
# Where the checkpoints are written in the background, the one after step 1 may or may not be complete in step 2.
DEATHS_IN_BACKGROUND = (("saving", 1, 1), ("update", 2, 0), ("resync", 3, 1), ("commit", 4, 0))
CLOCK = ("seconds/", "tokens_per_s")


class Lives:
    """The tests' end of the process that forks the ranks."""

    def __init__(self, url):
        self._url = url
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", Path(__file__).with_name("run_lives.py")],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def live(self, run, layout, death=None, more=()):
        """The rank that ended first, and its exit code."""
        kill = death and dict(zip(("place", "step", "rank"), death, strict=True))
        request = {"ranks": 2, "config": str(DEMO), "overrides": [*self.overrides(run, layout), *more], "kill": kill}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return tuple(json.loads(self._process.stdout.readline()))

    def overrides(self, run, layout):
        return [*TINY, *LAYOUTS[layout], f"run.dir={run}", f"verify.url={self._url}"]

    def close(self):
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def lives():
    with local_service() as url:
        started = Lives(url)
        yield started
        started.close()


@pytest.fixture(scope="module")
def uninterrupted(lives, tmp_path_factory):
    """The finished run of each layout."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for layout in LAYOUTS:
        assert lives.live(folder / layout, layout)[1] == 0
    return folder


def results(run):
    """All that a run leaves: metrics without clocks, evaluations, weights, and the bytes of its checkpoints."""
    metrics = [
        {name: value for name, value in record.items() if not name.startswith(CLOCK)}
        for record in read_records(run / "metrics.jsonl")
    ]
    evaluations = read_records(run / "evaluations.jsonl")
    files = {
        f"{path.parent.name}/{name}": digest
        for path in run.glob("checkpoints/*/manifest.json")
        for name, digest in json.loads(path.read_text()).items()
        if name not in ("policy/.metadata", "policy/common.pt", "ahead.pt")
    }
    for path in run.glob("checkpoints/*/ahead.pt"):  # it says how long each batch took
        batches = [(saved["batch"], saved["metrics"], saved["position"]) for saved in torch.load(path)]
        files[str(path.relative_to(run))] = [
            ({name: rows.tolist() for name, rows in batch.items()}, *rest) for batch, *rest in batches
        ]
    # Two pickles: torch's index of the other files, with a random name for the save, and what all ranks have in common.
    files |= {str(path.relative_to(run)): repr(torch.load(path)) for path in run.glob("checkpoints/*/policy/common.pt")}
    return metrics, evaluations, files, load_file(run / "model" / "model.safetensors")


def assert_equal(run, expected):
    *ours, weights = results(run)
    *theirs, expected_weights = results(expected)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other
    assert weights.keys() == expected_weights.keys()
    assert all(weights[name].equal(tensor) for name, tensor in expected_weights.items())
    assert sorted(os.listdir(run / "checkpoints")) == sorted(os.listdir(expected / "checkpoints"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_killed_in_every_phase_equals_the_uninterrupted_one(lives, uninterrupted, tmp_path, layout):
    for death in DEATHS:
        assert lives.live(tmp_path, layout, death) == (death[2], -signal.SIGKILL), death
    assert not (tmp_path / "model").exists()
    assert lives.live(tmp_path, layout)[1] == 0
    assert_equal(tmp_path, uninterrupted / layout)


def test_a_run_that_saves_in_the_background_equals_one_that_waits(lives, uninterrupted, tmp_path):
    for death in DEATHS_IN_BACKGROUND:
        ended = lives.live(tmp_path, "tp2", death, more=["run.async_checkpoint=true"])
        assert ended == (death[2], -signal.SIGKILL), death
    assert lives.live(tmp_path, "tp2", more=["run.async_checkpoint=true"])[1] == 0
    assert_equal(tmp_path, uninterrupted / "tp2")


def test_a_run_goes_on_in_another_layout_and_says_so(lives, uninterrupted, tmp_path):
    assert lives.live(tmp_path, "tp2", ("update", 2, 0)) == (0, -signal.SIGKILL)
    assert lives.live(tmp_path, "pp2")[1] == 0
    (note,) = [note for note in read_records(tmp_path / "notes.jsonl") if "layout" in note["about"]]
    assert note["step"] == 2
    assert "policy.tensor_parallel=2 became 1, policy.pipeline_parallel=1 became 2" in note["text"]
    theirs, _, _, expected_weights = results(uninterrupted / "tp2")
    metrics, _, _, weights = results(tmp_path)
    assert metrics[:2] == theirs[:2]
    for mine, other in zip(metrics, theirs, strict=True):
        assert mine["reward_mean"] == other["reward_mean"]
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0.0, atol=2e-5)  # an update moves a weight by 2e-4


def test_the_comparison_is_worth_something(uninterrupted):
    metrics, _, files, _ = results(uninterrupted / "tp2")
    assert len(metrics) == STEPS
    assert len({record["grad_norm"] for record in metrics}) == STEPS
    weights = [name for name in files if name.startswith("step_5/policy/__")]
    assert len(weights) >= 2
    assert all(files[name] != files[name.replace("step_5", "step_4")] for name in weights)
    assert [len(files[f"checkpoints/step_{step}/ahead.pt"]) for step in (4, 5)] == [1, 0]
    assert {"step_4/rng_0.pt", "step_4/rng_1.pt", "step_5/run_state.json", "checkpoints/step_5/policy/common.pt"} < set(
        files
    )


def test_ranks_end_with_a_launcher_that_was_killed(lives, uninterrupted, tmp_path):
    command = [sys.executable, "-m", "megatron_rlvr", "train", DEMO, *lives.overrides(tmp_path, "tp2")]
    launcher = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while not read_records(tmp_path / "metrics.jsonl"):
        assert launcher.poll() is None
        time.sleep(0.05)
    ranks = children(launcher.pid)
    assert len(ranks) >= 2
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20.0
    while alive := [rank for rank in ranks if running(rank)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    assert lives.live(tmp_path, "tp2")[1] == 0
    assert_equal(tmp_path, uninterrupted / "tp2")


def children(parent):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


def running(pid):
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout[:1] not in "Z"
