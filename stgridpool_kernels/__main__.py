"""`python -m stgridpool_kernels` is `stgp`."""

import sys

from .cli import main

sys.exit(main())
