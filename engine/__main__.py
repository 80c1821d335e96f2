"""`python -m pagelens` is the `pagelens` command."""

import sys

from .cli import main

sys.exit(main())
