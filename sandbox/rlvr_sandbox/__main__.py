"""``python -m rlvr_sandbox``."""

from __future__ import annotations

import sys

from rlvr_sandbox.cli import main

sys.exit(main())
