"""feverfew-simulate: a plain Hydra application that runs many hospitals on this machine."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from common.command import exit_code
from common.config import explained, plain, plan_of
from simulations.carrier import Carrier

COMMAND = "feverfew-simulate"


def main() -> None:
    """Entry point; exit code 0 well, 1 the run failed, 2 wrong input."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us, and become one clear line
    code = exit_code(lambda: explained(_run), command=COMMAND)
    gc.freeze()  # the interpreter would collect a million objects of torch's one by one: most of a second
    sys.exit(code)


def _run() -> int:
    global _carrier
    with Carrier(command=COMMAND) as _carrier:
        _simulate()
    return 0


_carrier: Carrier | None = None
"""What carries the runs of this command; Hydra calls with nothing but a config."""


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="simulation")
def _simulate(config: DictConfig) -> None:
    code = exit_code(lambda: _job(config), command=COMMAND)
    if code:
        raise SystemExit(code)  # Hydra would print lines of its own about an exception


def _job(config: DictConfig) -> int:
    from simulations.hospitals import prepare_sites  # after Hydra's own exits, such as --help
    from simulations.settings import num_sites, require_own_state, require_resumable, settings_of, source_of

    tree = plain(config)
    settings, source = settings_of(tree), source_of(tree["data"])
    require_own_state(settings, source)
    if tree["plan"]["sites"] is None:
        tree["plan"]["sites"] = num_sites(source)
    plan = plan_of(tree)
    directory = Path(HydraConfig.get().runtime.output_dir)
    require_resumable(settings, directory=directory)
    if settings.attack is not None:
        from simulations import attack  # torch takes seconds: not for a typing error

        attack.require_attackable(plan, settings)
        sites = prepare_sites(Path(settings.sites_directory), source=source)
        found = attack.run(plan, sites, attack=settings.attack, directory=directory)
        attack.show(found, directory=directory)
        return 0
    assert _carrier is not None
    _carrier.prepare(plan)
    sites = prepare_sites(Path(settings.sites_directory), source=source)
    return _carrier.run(plan, sites, settings=settings, directory=directory, log=_log(directory))


def _log(directory: Path) -> Path:
    """Returns where the workers write: those of a sweep stay for all its runs."""
    hydra = HydraConfig.get()
    place = Path(hydra.sweep.dir).absolute() if hydra.mode is RunMode.MULTIRUN else directory
    return place / "sites.log"
