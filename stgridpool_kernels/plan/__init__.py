"""Sizes and arguments in, integers out: which frame goes where. No tensor is made or read here."""

from .plan import RESIZES, SAMPLINGS, GridPlan, Level, Runs, grid_plan
from .tables import save_tables

__all__ = ["RESIZES", "SAMPLINGS", "GridPlan", "Level", "Runs", "grid_plan", "save_tables"]
