"""``python -m megatron_rlvr`` is the ``megatron-rlvr`` command."""

import sys

from megatron_rlvr.cli import main

if __name__ == "__main__":
    sys.exit(main())
