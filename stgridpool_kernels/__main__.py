"""Entry point of `python -m stgridpool_kernels`, which is the command `stgp`."""

import sys

from .cli.main import main

sys.exit(main())
