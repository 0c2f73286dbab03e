from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from client.process import SPINS, set_environment

FREED = """
import multiprocessing, os, resource, torch
from client.process import forkserver

def faults(pipe):
    for _ in range(20):
        torch.ones(10_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10_000_000)
    found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    pipe.send_bytes(f"{found} {os.environ['GOMP_SPINCOUNT']}".encode())

if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    process = forkserver().Process(target=faults, args=(theirs,))
    process.start()
    theirs.close()  # so that one that fails is not waited for
    print(ours.recv_bytes().decode())
    process.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.slow
def test_a_block_that_a_worker_freed_is_not_cleared_by_the_kernel_again(tmp_path) -> None:
    """40 MB are ten thousand pages, and by default each would be a fault each time."""
    (tmp_path / "freed.py").write_text(FREED)
    done = subprocess.run(
        [sys.executable, tmp_path / "freed.py"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    faults, spins = map(int, done.stdout.split())
    assert faults < 1000
    assert spins == SPINS, "set before torch's threads were there"


def test_who_has_set_one_in_the_environment_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "4096")
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    set_environment()
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "4096"
    assert os.environ["MALLOC_MMAP_THRESHOLD_"] == str(2**30)
    assert os.environ["GOMP_SPINCOUNT"] == "0"
