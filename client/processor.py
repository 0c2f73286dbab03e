"""What the processor of this machine is good at, as far as training asks."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

_CPUINFO: Final = Path("/proc/cpuinfo")
_HEAD: Final = 1024  # its bytes, in which the first of many processors is named


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Says whether the processor has instructions for bfloat16; without them it is slower than float32."""
    return _has("_is_avx512_bf16_supported") or has_tiles()


@lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Says whether the processor multiplies matrices of bfloat16 tile by tile (AMX)."""
    return _has("_is_amx_tile_supported")


@lru_cache(maxsize=1)
def shares_out_products() -> bool:
    """Says whether a second thread hastens torch's products of matrices.

    They are MKL's on x86, and those of the sizes that training needs gain from it on Intel's processors only.
    oneDNN, which computes torch's convolutions, shares them out on any.
    """
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return not has_mkl or "GenuineIntel" in _named()


def _has(name: str) -> bool:
    return bool(getattr(torch.cpu, name, lambda: False)())


def _named() -> str:
    try:
        with _CPUINFO.open() as file:
            return file.read(_HEAD)
    except OSError:  # not Linux
        return ""
