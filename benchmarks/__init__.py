"""Benchmarks: each file runs on its own, compares side by side in one run and reports ratios."""
