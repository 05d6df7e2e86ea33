"""Benchmarks of the package. They are not installed."""
