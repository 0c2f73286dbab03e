"""Coverage-guided fuzzing of every parser of bytes that come from outside; ``make fuzz``.

Each ``fuzz_<parser>.py`` has ``SEEDS`` (inputs to begin with, and inputs that once found a defect) and
``parse``, which swallows the errors that its parser documents and nothing else. A crash, a hang of ten
seconds or more than two gigabytes of memory ends the run, and the input is kept. ``tests/test_fuzz.py`` runs
all seeds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

PARSERS = ("checkpoint", "dicom", "messages", "objects", "plan", "site", "table")
INSTRUMENTED = [
    "common",
    "client",
    "server",
    "tests",
    "yaml",
    "pydicom",
    "flwr.app",
    "flwr.common.serde",
    "csv",
]
_DIRECTORY = tempfile.TemporaryDirectory()
PLACE = Path(_DIRECTORY.name)
"""Where harnesses write what is read from a file."""
LIMITS = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=65536"]


def main() -> None:
    """Fuzzes one parser until the time is over or something is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parser", choices=PARSERS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--found", type=Path, default=Path("fuzz"), help="folder for inputs that were found")
    asked = parser.parse_args()
    import atheris  # an extra of its own: coverage of Python code for libFuzzer

    with atheris.instrument_imports(include=INSTRUMENTED):
        harness = importlib.import_module(f"tests.fuzz_{asked.parser}")
    asked.found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(harness.SEEDS):
            (Path(corpus) / str(number)).write_bytes(seed)
        limits = [
            *LIMITS,
            f"-max_total_time={asked.seconds}",
            f"-artifact_prefix={asked.found}/{asked.parser}-",
        ]
        atheris.Setup([sys.argv[0], *limits, corpus], harness.parse)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
