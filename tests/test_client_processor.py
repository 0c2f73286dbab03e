"""What is known of the processor is what the system and torch say of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from client import processor

ASKED = (processor.multiplies_bfloat16, processor.has_tiles, processor.shares_out_products)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    for one in ASKED:
        one.cache_clear()
    yield
    for one in ASKED:
        one.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "has_mkl", "expected"),
    [
        ("GenuineIntel", True, True),
        ("AuthenticAMD", True, False),
        (None, True, False),
        ("AuthenticAMD", False, True),
        (None, False, True),
    ],
)
def test_only_mkl_on_processors_of_others_shares_no_products_out(
    vendor: str | None, has_mkl: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "cpuinfo"
    if vendor is not None:
        named.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 6\n" + "flags\t: a\n" * 9999)
    monkeypatch.setattr(processor, "_CPUINFO", named)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    assert processor.shares_out_products() == expected


@pytest.mark.parametrize(("avx", "tiles"), [(False, False), (True, False), (False, True), (True, True)])
def test_either_kind_of_instruction_multiplies_bfloat16(
    avx: bool, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert processor.has_tiles() == tiles
    assert processor.multiplies_bfloat16() == (avx or tiles)


def test_a_torch_that_cannot_tell_has_no_such_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not processor.multiplies_bfloat16()
