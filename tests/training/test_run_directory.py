import dataclasses
import json

import pytest

from megatron_rlvr.config import ConfigError, load_config
from megatron_rlvr.core import RLVRError
from megatron_rlvr.report import append_record, read_records
from megatron_rlvr.training.run_directory import RunDirectory


@pytest.fixture
def config(tmp_path):
    return load_config(None, [f"run.dir={tmp_path / 'run'}", "data.train=countdown:train", "policy.model=m"])


@pytest.fixture
def directory(config):
    directory = RunDirectory(config.run.dir)
    directory.open(config)
    return directory


def change(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def write_checkpoint(directory, step, kept=2):
    unfinished = directory.start_checkpoint(step)
    (unfinished / "policy").mkdir()
    (unfinished / "policy" / "weights").write_bytes(bytes([step]) * 1000)
    (unfinished / "run_state.json").write_text(json.dumps({"step": step}))
    directory.commit_checkpoint(step, kept)


def test_the_same_settings_continue_a_run(config, directory):
    directory.open(config)
    directory.open(change(config, "run", checkpoint_every=1, checkpoints_kept=9))
    directory.open(change(config, "verify", url="http://127.0.0.1:1"))


def test_another_layout_continues_a_run(config, directory):
    directory.open(change(config, "policy", tensor_parallel=2, pipeline_parallel=2, micro_batch=1))
    options = {"recompute_granularity": "full", "num_layers_in_first_pipeline_stage": 3, "overlap_grad_reduce": True}
    directory.open(change(config, "policy", megatron=options))
    for fixed in ({"clip_grad": 0.5}, {"use_distributed_optimizer": True}):
        with pytest.raises(ConfigError, match=r"other settings \(policy\.megatron\)"):
            directory.open(change(config, "policy", megatron=options | fixed))


def test_other_servers_continue_a_run(config, directory):
    moved = {"urls": "http://b:1", "servers": 3, "transport": "disk", "trainer_address": "b", "sglang": {"tp_size": 2}}
    directory.open(change(config, "rollout", **moved))
    with pytest.raises(ConfigError, match=r"other settings \(rollout\.max_staleness\)"):
        directory.open(change(config, "rollout", **moved, max_staleness=1))


def test_other_settings_are_refused_and_named(config, directory):
    before = directory.config_file.read_text()
    with pytest.raises(
        ConfigError, match=r"other settings \(run\.seed, policy\.learning_rate\); choose another run\.dir"
    ):
        directory.open(change(change(config, "run", seed=1), "policy", learning_rate=1.0))
    assert directory.config_file.read_text() == before


def test_an_unwritable_directory_is_refused(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(RLVRError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").open(config)


def test_checkpoints_are_listed_by_number_and_pruned(directory):
    for step in (2, 10, 9):
        write_checkpoint(directory, step, kept=5)
    assert directory.saved_steps() == [2, 9, 10]
    write_checkpoint(directory, 11, kept=2)
    assert directory.saved_steps() == [10, 11]


def test_a_checkpoint_that_was_being_written_is_not_seen(directory):
    write_checkpoint(directory, 2)
    (directory.start_checkpoint(4) / "half").write_text("")
    assert directory.saved_steps() == [2]
    write_checkpoint(directory, 4)
    assert not (directory.checkpoint(4) / "half").exists()


def test_what_kills_left_is_removed(directory):
    for step in (2, 4, 6):
        write_checkpoint(directory, step, kept=9)
    for left in (3, 4):
        (directory.checkpoints / f"unfinished_{left}" / "policy").mkdir(parents=True)
    directory.prune(kept=2)
    assert sorted(path.name for path in directory.checkpoints.iterdir()) == ["step_4", "step_6"]


def test_an_intact_checkpoint_passes(directory):
    write_checkpoint(directory, 2)
    directory.verify_checkpoint(2)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_refused_with_a_way_out(directory, damage):
    for step in (2, 4):
        write_checkpoint(directory, step)
    weights, manifest = directory.checkpoint(4) / "policy" / "weights", directory.checkpoint(4) / "manifest.json"
    {
        "flip": lambda: weights.write_bytes(weights.read_bytes()[:-1] + b"x"),
        "truncate": lambda: weights.write_bytes(b""),
        "remove": weights.unlink,
        "manifest": lambda: manifest.write_text("{"),
        "no manifest": manifest.unlink,
    }[damage]()
    with pytest.raises(RLVRError, match=r"step_4 is damaged .* remove that directory to resume from .*step_2"):
        directory.verify_checkpoint(4)
    directory.verify_checkpoint(2)


def test_the_only_damaged_checkpoint_says_start_over(directory):
    write_checkpoint(directory, 2)
    (directory.checkpoint(2) / "run_state.json").write_text("")
    with pytest.raises(RLVRError, match="remove that directory to start from the first step"):
        directory.verify_checkpoint(2)


def test_records_after_the_checkpoint_are_dropped(directory):
    for step in range(5):
        append_record(directory.metrics_file, {"step": step})  # step k is the (k+1)-th
    for step in (0, 2, 4):
        append_record(directory.evaluations_file, {"step": step})  # after so many steps
    directory.truncate_records(2)
    assert [record["step"] for record in read_records(directory.metrics_file)] == [0, 1]
    assert [record["step"] for record in read_records(directory.evaluations_file)] == [0, 2]
    directory.truncate_records(0)  # killed before the first checkpoint: the base model is evaluated again
    assert read_records(directory.metrics_file) == read_records(directory.evaluations_file) == []


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"step": 0})
    with path.open("a") as file:
        file.write('{"step": 1, "entr')
    assert read_records(path) == [{"step": 0}]
    assert read_records(tmp_path / "none.jsonl") == []
