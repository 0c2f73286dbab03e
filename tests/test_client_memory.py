from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FREED = """
import resource, torch
from client.memory import keep_freed_blocks
assert keep_freed_blocks()
for _ in range(20):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_block_that_was_freed_is_not_cleared_by_the_kernel_again() -> None:
    """40 MB are ten thousand pages, and by default each would be a fault each time."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000
