"""What a site's daemon counts of itself, for the monitor of its own computer; none of it is private."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class Vitals:
    """Counters of one agent: whether it is connected, how its tasks ended, how often its worker died."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.connected = Gauge(
            "feverfew_site_connected", "1 while the coordinator knows this site.", registry=self.registry
        )
        self.resting = Gauge(
            "feverfew_site_resting", "1 while paused or outside of the hours.", registry=self.registry
        )
        self.tasks = Counter(
            "feverfew_site_tasks",
            "Tasks by kind and outcome (answered, failed, undelivered, superseded).",
            ("kind", "outcome"),
            registry=self.registry,
        )
        self.worker_deaths = Counter(
            "feverfew_site_worker_deaths", "Processes that died over a task.", registry=self.registry
        )
        self.last_task = Gauge(
            "feverfew_site_last_task_timestamp_seconds", "When the last task ended.", registry=self.registry
        )
