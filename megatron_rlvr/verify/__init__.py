"""Verdicts on responses, from the verifier service by HTTP."""

from __future__ import annotations

from megatron_rlvr.verify.client import VerifierClient
from megatron_rlvr.verify.service import local_service

__all__ = ["VerifierClient", "local_service"]
