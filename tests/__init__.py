"""Flat: tests/test_<package>_<module>.py."""
