"""Trainer and engine agree on the log-probs of what the embedded engine samples, update after update."""

from __future__ import annotations

from pathlib import Path

import torch
from policy_models import BASE, sampled_batch
from policy_ranks import run_ranks


def test_engine_log_probs_are_the_trainers_after_every_update(tmp_path: Path) -> None:
    torch.save(sampled_batch(BASE), tmp_path / "batch.pt")
    policy = {"model": str(BASE), "tensor_parallel": 2, "learning_rate": 1e-3}
    prompts = ["259:07;", "48:", "1"]
    ranks = run_ranks("resync", 2, policy=policy, batch_file=str(tmp_path / "batch.pt"), prompts=prompts)
    for reports in ranks:
        assert [report["version"] for report in reports] == [0, 1, 2]
        for report, first in zip(reports, ranks[0], strict=True):
            torch.testing.assert_close(report["engine"], report["trainer"], rtol=0.0, atol=1e-5)
            assert torch.equal(report["engine"], first["engine"])
    before, after = ranks[0][0]["engine"], ranks[0][2]["engine"]
    assert before.shape != after.shape or (before - after).abs().max() > 1e-3
