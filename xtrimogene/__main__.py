"""``python -m xtrimogene``: the same as the command ``xtrimogene``."""

import sys

from xtrimogene.cli import main

sys.exit(main())
