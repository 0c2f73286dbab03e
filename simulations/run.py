"""The runs that were typed: a plain Hydra application."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from common.command import exit_code
from common.config import explained, plain, plan_of
from simulations.carrier import Carrier
from simulations.interrupts import Interrupts


def typed(carrier: Carrier, interrupts: Interrupts, *, command: str) -> int:
    """Checks what was typed and runs it, all runs of a sweep; returns the exit code.

    Args:
        interrupts: heard once all is imported and checked.
        command: named in messages.
    """

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name="simulation")
    def application(config: DictConfig) -> None:
        code = exit_code(lambda: _job(config, carrier, interrupts), command=command)
        if code:
            raise SystemExit(code)  # Hydra would print lines of its own about an exception

    explained(application)
    return 0


def _job(config: DictConfig, carrier: Carrier, interrupts: Interrupts) -> int:
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
    interrupts.hear()
    if settings.attack is not None:
        carrier.dismiss()
        from simulations import attack  # torch takes seconds: not for a typing error

        attack.require_attackable(plan, settings)
        sites = prepare_sites(Path(settings.sites_directory), source=source)
        found = attack.run(plan, sites, attack=settings.attack, directory=directory)
        attack.show(found, directory=directory)
        return 0
    carrier.prepare(plan)
    sites = prepare_sites(Path(settings.sites_directory), source=source)
    return carrier.run(plan, sites, settings=settings, directory=directory, log=_log(directory))


def _log(directory: Path) -> Path:
    """Returns where the workers write: those of a sweep stay for all its runs."""
    hydra = HydraConfig.get()
    place = Path(hydra.sweep.dir).absolute() if hydra.mode is RunMode.MULTIRUN else directory
    return place / "sites.log"
