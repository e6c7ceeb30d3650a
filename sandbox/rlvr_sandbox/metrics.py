"""What the service counts, for Prometheus. One object for one service, so that a test may have several."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from rlvr_sandbox.execution import Ending, Outcome
from rlvr_sandbox.verdicts import Judgement, Verdict

_RUN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_WAIT_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_KILLS = {Ending.TIME_LIMIT: "time", Ending.MEMORY_LIMIT: "memory", Ending.OUTPUT_LIMIT: "output"}
STAGE_FLAG = "stage:"

# A second series for each counter, with the time of its birth, is of no use here.
disable_created_metrics()  # type: ignore[no-untyped-call]


class _SlotRestarts(Collector):
    """A counter that the executor keeps itself."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Its value now."""
        yield CounterMetricFamily("rlvr_sandbox_slot_restarts", "Slots replaced after they broke", self._count())


class Metrics:
    """The counters, histograms and gauges of one service; names are in the README."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"rlvr_sandbox_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"rlvr_sandbox_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"rlvr_sandbox_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "HTTP requests answered", "route", "status")
        self.verdicts = counter("verdicts", "Verdicts given", "kind", "mode", "language", "trust", "verdict")
        self.infra_errors = counter("infra_errors", "Items left without a verdict", "kind")
        self.flags = counter("flags", "Suspicions raised about responses", "flag")
        self.math_stages = counter("math_stages", "Math answers by the stage that decided them", "stage")
        self.cache_hits = counter("cache_hits", "Items answered from the cache", "kind")
        self.runs = counter("runs", "Programs run", "language", "ending")
        self.run_cpu_s = histogram("run_cpu_seconds", "CPU seconds of a program", _RUN_SECONDS, "language")
        self.run_wall_s = histogram("run_wall_seconds", "Wall seconds of a program", _RUN_SECONDS, "language")
        self.kills = counter("kills", "Programs and workers killed", "what", "reason")
        self.worker_restarts = counter("worker_restarts", "Workers replaced after they died or were killed")
        self.queue_items = gauge("queue_items", "Items that wait for their turn", "lane")
        self.queue_s = histogram("queue_seconds", "Seconds that an item waited for its turn", _WAIT_SECONDS, "lane")
        self.backend_info = gauge("backend_info", "1 for the isolation backend in use", "backend")

    def watch_restarts(self, count: Callable[[], int]) -> None:
        """Show the restarts of slots that ``count`` returns."""
        self.registry.register(_SlotRestarts(count))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def judged(self, kind: str, mode: str, language: str, judgement: Judgement) -> None:
        """Count one verdict."""
        self.verdicts.labels(kind, mode, language, judgement.trust, judgement.verdict).inc()
        if judgement.verdict is Verdict.INFRA_ERROR:
            self.infra_errors.labels(kind).inc()
        for flag in judgement.flags:
            if flag.startswith(STAGE_FLAG):
                self.math_stages.labels(flag.removeprefix(STAGE_FLAG)).inc()
            else:
                self.flags.labels(flag).inc()

    def ran(self, language: str, outcome: Outcome) -> None:
        """Count one run of a program."""
        self.runs.labels(language, outcome.ending).inc()
        self.run_cpu_s.labels(language).observe(outcome.cpu_s)
        self.run_wall_s.labels(language).observe(outcome.wall_s)
        if reason := _KILLS.get(outcome.ending):
            self.kills.labels("program", reason).inc()
