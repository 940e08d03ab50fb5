"""python -m pixmim.cli"""

import sys

from pixmim.cli import main

sys.exit(main())
