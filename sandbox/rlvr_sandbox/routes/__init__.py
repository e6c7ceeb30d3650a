"""The routes: the service's own, those of other sandboxes and trainers, and those for whoever operates it."""

from __future__ import annotations
