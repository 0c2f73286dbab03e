"""What the coordinator counts of itself, for the monitor of its own computer; none of it is private."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterator

import httpx
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.home import Home
from server.refusals import REASONS
from server.status import status
from server.traffic import Traffic


class Vitals:
    """Counters of one supervisor; what processes, sites and runs do is looked up when it is asked for."""

    def __init__(self, home: Home) -> None:
        self.registry = CollectorRegistry()
        self.restarts = Counter(
            "feverfew_process_restarts",
            "How often a process of the coordinator was started again.",
            ("process",),
            registry=self.registry,
        )
        self.registry.register(_Found(home))
        self.registry.register(_Gateway(home))


class _Found(Collector):
    def __init__(self, home: Home) -> None:
        self._home = home

    def describe(self) -> list[GaugeMetricFamily]:
        """Names nothing, so that registering asks for nothing."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yields the gauges as they are now."""
        try:
            found = status(self._home)
        except httpx.HTTPError:
            return
        up = GaugeMetricFamily("feverfew_process_up", "1 while a process runs.", labels=["process"])
        for name, pid in found.processes.items():
            up.add_metric([name], float(pid is not None))
        yield up
        online = GaugeMetricFamily("feverfew_site_online", "1 while a site is connected.", labels=["site"])
        for name, state in found.sites.items():
            online.add_metric([name], float(state == "online"))
        yield online
        runs = GaugeMetricFamily("feverfew_runs", "Runs by state.", labels=["status"])
        for name, number in Count(line.status for line in found.runs).items():
            runs.add_metric([name], number)
        yield runs


class _Gateway(Collector):
    """What the gateway, another process, has told; nothing where none has run yet."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def describe(self) -> list[Metric]:
        """Names nothing, so that registering asks for nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields what was told last; each reason is there from the start, and there are no others."""
        told = Traffic.read(self._home.traffic)
        if told is None:
            return
        yield CounterMetricFamily(
            "feverfew_gateway_passed", "Requests that went on to the SuperLink.", value=told.passed
        )
        refused = CounterMetricFamily(
            "feverfew_gateway_refused", "Connections and requests that were refused.", labels=["reason"]
        )
        for reason in REASONS:
            refused.add_metric([reason], told.refused.get(reason, 0))
        yield refused
        yield GaugeMetricFamily(
            "feverfew_gateway_connections", "Open connections of sites.", value=told.connections
        )
        yield GaugeMetricFamily("feverfew_gateway_sites", "Sites with a connection.", value=told.sites)
