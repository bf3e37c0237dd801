"""Benchmarks, run by hand as ``python -m benchmarks.NAME``: ours beside the peers in one run, ratios printed."""
