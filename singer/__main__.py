"""``python -m singer``."""

import sys

from singer.cli import main

sys.exit(main())
