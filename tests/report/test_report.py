import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.report import RunRecorder, append_record, read_records
from megatron_rlvr.report.report import _smooth, load_run, write_report


def record(step, entropy=0.5, weight=1.0, reward=0.25):
    return {
        **{"step": step, "entropy": entropy, "positive_weight": weight, "reward_mean": reward},
        **{"tokens_per_s": 1.0, "grad_norm": 1.0},
    }


def evaluation(step, accuracy):
    return {"step": step, "avg_at_k": accuracy, "pass_at_k": {"1": accuracy}, "distinct_correct": 1.0}


@pytest.fixture
def two_runs(tmp_path):
    for name, end in (("grpo", 0.2), ("par", 0.4)):
        (tmp_path / name).mkdir()
        for step in range(30):
            entropy = 0.5 if step < 10 else end
            append_record(tmp_path / name / "metrics.jsonl", record(step, entropy, reward=0.3 if step < 20 else 0.35))
        append_record(tmp_path / name / "evaluations.jsonl", evaluation(0, 0.21))
        append_record(tmp_path / name / "evaluations.jsonl", evaluation(30, 0.31))
    return tmp_path


def test_the_summary_is_computed_from_the_runs(two_runs):
    lines = write_report([two_runs / "grpo", two_runs / "par"], two_runs).splitlines()
    assert lines[0].startswith("grpo: entropy 0.500 → 0.200, λ at the end 1.00, reward 0.300 → 0.350")
    assert lines[0].endswith("held-out accuracy 0.210 → 0.310")
    assert lines[1].startswith("par: entropy 0.500 → 0.400")
    assert lines[2] == "entropy at the end against grpo: par 2.00×"
    assert (two_runs / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (two_runs / "report.html").read_text()
    assert "0.310" in page
    assert "data:image/png;base64," in page


def test_one_run_reports_into_its_own_directory(two_runs):
    write_report([two_runs / "par"])
    assert (two_runs / "par" / "report.html").exists()


def test_a_directory_without_steps_is_refused(tmp_path):
    with pytest.raises(RLVRError, match="no recorded steps"):
        load_run(tmp_path)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_smoothing_is_the_mean_of_the_last_ten(values):
    expected = [np.mean(values[max(0, end - 10) : end]) for end in range(1, len(values) + 1)]
    assert _smooth(np.array(values)) == pytest.approx(expected)


def test_the_recorder_keeps_steps_and_evaluations(tmp_path, capsys):
    with RunRecorder(tmp_path, total_steps=2, first_step=0) as recorder:
        recorder.record_evaluation(evaluation(0, 0.2))
        for step in range(2):
            recorder.record_step(record(step))
    assert [kept["step"] for kept in read_records(tmp_path / "metrics.jsonl")] == [0, 1]
    assert read_records(tmp_path / "evaluations.jsonl")[0]["avg_at_k"] == 0.2
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert "H=0.500 λ=1.00 reward=0.250" in capsys.readouterr().err


def test_the_report_command(two_runs, command):
    done = command("report", two_runs / "grpo", two_runs / "par", "--output", two_runs / "out")
    assert done.returncode == 0
    assert "par 2.00×" in done.stdout
    refused = command("report", two_runs / "none")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")


def test_the_keys_command_lists_every_key(command):
    listed = command("keys").stdout
    assert "entropy.target" in listed
    assert "(required)" in listed
