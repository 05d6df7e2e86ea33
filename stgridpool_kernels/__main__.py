"""`python -m stgridpool_kernels` is `stgp`."""

import sys

from .cli.main import main

sys.exit(main())
