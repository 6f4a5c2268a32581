"""``python -m graftlm``: the same as the ``graftlm`` command."""

import sys

from graftlm.cli.main import main

sys.exit(main())
