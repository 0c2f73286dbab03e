"""feverfew-simulate: a plain Hydra application that runs many hospitals on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from common import config as configs
from common.command import exit_code
from common.config import explained, plain, plan_of

COMMAND = "feverfew-simulate"


def main() -> None:
    """Entry point; exit code 0 well, 1 the run failed, 2 wrong input."""
    from client.worker import forkserver

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us and become one line each
    forkserver(preload=PRELOADED)
    sys.exit(exit_code(lambda: explained(_run), command=COMMAND))


PRELOADED = ("client.app", "client.clipping")


def _run() -> int:
    _simulate()
    return 0


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="simulation")
def _simulate(config: DictConfig) -> None:
    from simulations.simulation import simulate  # after Hydra's own exits, such as --help

    tree: dict[str, Any] = plain(config)
    simulate(plan_of(tree), tree, directory=Path(HydraConfig.get().runtime.output_dir))


__all__ = ["configs", "main"]
