"""A check of 100,000 rows: what it finds, how long it takes, and how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image as Pillow

from client import skeleton
from common import keys

ROWS, BAD_EVERY, COPY_EVERY = 100_000, 100, 1000
MEGABYTES = 800  # in the first process; its libraries take 250, and the others about 110 each
PROGRAM = """
import re, resource, sys, time
from pathlib import Path
from client.__main__ import main
start = time.monotonic()
sys.argv = ["feverfew-client", "check", sys.argv[1], "--json"]
code = 1
try:
    main()
except SystemExit as end:
    code = end.code
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds, cpu = time.monotonic() - start, used.ru_utime + used.ru_stime
    # ru_maxrss would begin with the memory of the process that started this one
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    print(f"{code} {seconds:.0f} {cpu:.0f} {peak // 1024}", file=sys.stderr)
"""


def write_site(directory: Path) -> None:
    """Every hundredth file is empty; every thousandth shows what the one before does, of the same patient."""
    (directory / "private").mkdir(parents=True, mode=0o700)
    keys.write_secret(directory / "private" / "split.key", b"ab" * 32)
    tree = yaml.safe_load(skeleton.settings_text(name="large", nominal_patients=35_000))
    (directory / "site.yaml").write_text(yaml.safe_dump(tree))
    rng = np.random.default_rng(0)
    with (directory / "cases.csv").open("w") as table:
        table.write("image,label,patient_id\n")
        for number in range(ROWS):
            path = directory / f"i{number // 1000}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            if number % COPY_EVERY != 1:
                pixels = rng.integers(0, 256, (12, 12), dtype=np.uint8)
            if number % BAD_EVERY == BAD_EVERY - 1:
                path.write_bytes(b"")
            else:
                Pillow.fromarray(pixels).save(path, compress_level=number % COPY_EVERY == 1)
            label = ("normal", "opacity")[number // 2 % 2]
            table.write(f"{path.relative_to(directory)},{label},P{number // 2}\n")


def checked(directory: Path) -> tuple[dict[str, object], list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)], capture_output=True, text=True, timeout=3600
    )
    return json.loads(done.stdout), [int(number) for number in done.stderr.splitlines()[-1].split()]


@pytest.mark.slow
def test_a_table_of_100_000_rows_is_checked_in_little_memory(tmp_path: Path) -> None:
    directory = tmp_path / "large"
    write_site(directory)
    found, (code, seconds, cpu, own) = checked(directory)
    print(f"first check: {seconds} s, processor {cpu} s, {own} MB")
    assert code == 0 and found["offered"] == ROWS
    quarantined = found["quarantined"]
    assert isinstance(quarantined, dict)
    counted = {name: one["cases"] for name, one in quarantined.items()}
    assert counted == {"empty_file": ROWS // BAD_EVERY, "duplicate_pixels": ROWS // COPY_EVERY}
    assert found["used"] == ROWS - ROWS // BAD_EVERY - ROWS // COPY_EVERY
    assert own < MEGABYTES
    again, (code, seconds, warm, own) = checked(directory)
    print(f"second check: {seconds} s, processor {warm} s, {own} MB")
    assert code == 0 and again["used"] == found["used"] and own < MEGABYTES
