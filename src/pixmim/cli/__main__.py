"""python -m pixmim.cli: the command that torchrun and Slurm start."""

import sys

from pixmim.cli import main

sys.exit(main())
