"""The command line as `python -m minivae`."""

import sys

from .cli import main

sys.exit(main())
