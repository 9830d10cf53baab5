"""``python -m diymodel``: the command line without an installed script."""

import sys

from diymodel.cli import main

sys.exit(main())
