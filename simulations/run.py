"""feverfew-simulate: a plain Hydra application that runs many hospitals on this machine."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from common.command import exit_code
from common.config import explained, plain, plan_of
from common.plan import NoPrivacy, Plan

if TYPE_CHECKING:  # takes long to import: not for a typing error
    from simulations.workers import Workers

COMMAND = "feverfew-simulate"


def main() -> None:
    """Entry point; exit code 0 well, 1 the run failed, 2 wrong input."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us, and become one clear line
    code = exit_code(lambda: explained(_run), command=COMMAND)
    for pool in _pools.values():
        pool.close()
    gc.freeze()  # the interpreter would collect a million objects of torch's one by one: most of a second
    sys.exit(code)


def _run() -> int:
    _simulate()
    return 0


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="simulation")
def _simulate(config: DictConfig) -> None:
    code = exit_code(lambda: _job(config), command=COMMAND)
    if code:
        raise SystemExit(code)  # Hydra would print lines of its own about an exception


def _job(config: DictConfig) -> int:
    from simulations.hospitals import prepare_sites  # after Hydra's own exits, such as --help
    from simulations.settings import num_sites, require_own_state, settings_of, source_of

    tree = plain(config)
    settings, source = settings_of(tree), source_of(tree["data"])
    require_own_state(settings, source)
    if tree["plan"]["sites"] is None:
        tree["plan"]["sites"] = num_sites(source)
    plan = plan_of(tree)
    directory = Path(HydraConfig.get().runtime.output_dir)
    if settings.attack is not None:
        from simulations import attack  # torch takes seconds: not for a typing error

        attack.require_attackable(plan, settings)
        sites = prepare_sites(Path(settings.sites_directory), source=source)
        found = attack.run(plan, sites, attack=settings.attack, directory=directory)
        attack.show(found, directory=directory)
        return 0
    _start_workers_early(plan)
    from simulations.simulation import show, simulate  # the same

    sites = prepare_sites(Path(settings.sites_directory), source=source)
    report = simulate(plan, sites, settings=settings, directory=directory, pool=_pool())
    show(report, directory=directory)
    return 0


_pools: dict[Path, Workers] = {}
"""The workers of a sweep, by its folder."""


def _pool() -> Workers | None:
    """Returns the workers of the sweep that this run is one of; None for a run alone."""
    from simulations.workers import Workers

    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN:
        return None
    sweep = Path(hydra.sweep.dir)
    return _pools.setdefault(sweep, Workers(log=sweep.absolute() / "sites.log"))


def _start_workers_early(plan: Plan) -> None:
    """Lets the fork server import what workers need while this process imports its own half."""
    from multiprocessing import forkserver as server

    from client.worker import forkserver

    private = [] if isinstance(plan.privacy, NoPrivacy) else ["client.clipping"]
    forkserver(preload=["client.app", *private])
    server.ensure_running()
