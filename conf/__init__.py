"""Defaults of every setting; found by Hydra as ``pkg://conf``."""
