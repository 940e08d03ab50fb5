"""python -m pixmim.cli, as torchrun and Slurm start each process."""

import os
import sys

from pixmim.cli import main

status = main()
if "MASTER_ADDR" in os.environ:  # one of several
    from pixmim.dist import leave

    leave(status)
sys.exit(status)
