"""ST-GridPool (ICLR 2026) for video LLMs: `torch.ops.stgp.grid_pool(x)` on (T, H, W, C) visual tokens."""

from .backends import available_backends, use_backend
from .flat import pool_flat
from .functional import GridPool, grid_pool, norm_pool, temporal_grid, token_norm
from .plan import GridPlan, grid_plan
from .stream import GridPoolStream
from .version import __version__

__all__ = [
    "GridPlan",
    "GridPool",
    "GridPoolStream",
    "__version__",
    "available_backends",
    "grid_plan",
    "grid_pool",
    "norm_pool",
    "pool_flat",
    "temporal_grid",
    "token_norm",
    "use_backend",
]
