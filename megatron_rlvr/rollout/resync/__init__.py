"""New weights reach every server as a verified transaction."""

from megatron_rlvr.rollout.resync.broadcast import BroadcastTransport
from megatron_rlvr.rollout.resync.resync import Resync
from megatron_rlvr.rollout.resync.transports import DiskTransport, TensorTransport, Transport

__all__ = ["BroadcastTransport", "DiskTransport", "Resync", "TensorTransport", "Transport"]
