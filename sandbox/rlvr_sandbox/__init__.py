"""The verifier service: judges responses of a policy and answers with verdicts, over HTTP and nothing else."""

from __future__ import annotations

__version__ = "0.1.0"
