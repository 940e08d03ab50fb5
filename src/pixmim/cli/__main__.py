"""python -m pixmim.cli, as torchrun and Slurm start each process."""

import sys

from pixmim.cli import main

sys.exit(main())
