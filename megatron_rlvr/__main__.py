"""``python -m megatron_rlvr`` is the ``megatron-rlvr`` command."""

import sys

from megatron_rlvr.cli import main

sys.exit(main())
