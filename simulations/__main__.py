"""feverfew-simulate: runs many hospitals on this machine."""

from __future__ import annotations

import gc
import os
import sys

from common.command import exit_code
from simulations.carrier import Carrier
from simulations.interrupts import Interrupts

COMMAND = "feverfew-simulate"


def main() -> None:
    """Entry point; exit code 0 well, 1 the run failed, 2 wrong input."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us, and become one clear line
    code = exit_code(_run, command=COMMAND)
    gc.freeze()  # the interpreter would collect a million objects of torch's one by one: most of a second
    sys.exit(code)


def _run() -> int:
    with Interrupts() as interrupts, Carrier(command=COMMAND) as carrier:
        from simulations import run  # with Hydra, while the carrier's process imports the rest

        return run.typed(carrier, interrupts, command=COMMAND)


if __name__ == "__main__":
    main()
