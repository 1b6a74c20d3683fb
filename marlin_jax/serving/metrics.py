# SPDX-License-Identifier: Apache-2.0
"""What `/metrics` tells, in Prometheus's text format; every name and definition is here.

Numbers of the scheduler are read when they are asked for; the others are counted as requests end.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from marlin_jax.serving.request import GenerationRequest, TokenEvent
from marlin_jax.serving.scheduler import Scheduler

_PREFIX = "marlin_jax_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
_SECONDS_PER_TOKEN = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class _SchedulerCollector(Collector):
  def __init__(self, scheduler: Scheduler):
    self._scheduler = scheduler

  def collect(self) -> Iterator[Metric]:
    stats, config = self._scheduler.stats, self._scheduler.config
    for name, help, value in (
      ("ready", "1 if everything is compiled and requests are taken.", float(self._scheduler.ready)),
      ("requests_waiting", "Requests in the queue.", stats.queued),
      ("queue_limit", "Requests that may wait.", config.queue_limit),
      ("slots", "Requests that are decoded at the same time, at most.", config.slots),
      ("slots_used", "Slots that hold a request.", stats.slots_used),
      (
        "kv_cache_usage_ratio",
        "Positions of the key-value cache that hold a token of a request, of all positions.",
        stats.cache_used / (config.slots * config.context),
      ),
    ):
      yield GaugeMetricFamily(_PREFIX + name, help, value=value)
    for name, help, value in (
      (
        "recompilations",
        "Programs that the server compiled after it was ready; always 0 unless it has a bug.",
        stats.recompilations,
      ),
      ("step_faults", "Steps of the model that failed.", stats.faults),
      ("decode_chunks", "Chunks of decode steps.", stats.decode_chunks),
      (
        "decoded_rows",
        "Slots that were decoding, summed over the chunks; over decode_chunks: mean batch.",
        stats.decoded_rows,
      ),
    ):
      yield CounterMetricFamily(_PREFIX + name, help, value=value)


class Metrics:
  """The metrics of one server, in a registry of their own."""

  def __init__(self, scheduler: Scheduler):
    self._registry = registry = CollectorRegistry()
    registry.register(_SchedulerCollector(scheduler))
    self._responses = Counter(
      _PREFIX + "http_responses", "HTTP responses, by route and status.", ["route", "status"], registry=registry
    )
    self._finished = Counter(
      _PREFIX + "requests_finished",
      "Continuations that ended, by reason: stop, length, cancelled (the client left, or the deadline passed), error.",
      ["reason"],
      registry=registry,
    )
    for reason in ("stop", "length", "cancelled", "error"):
      self._finished.labels(reason)
    self._prompt_tokens = Counter(_PREFIX + "prompt_tokens", "Tokens of prompts.", registry=registry)
    self._tokens = Counter(_PREFIX + "generation_tokens", "Tokens generated.", registry=registry)

    def histogram(name: str, help: str, buckets: tuple[float | int, ...]) -> Histogram:
      return Histogram(_PREFIX + name, help, buckets=buckets, registry=registry)

    self._queue = histogram("queue_seconds", "From the request's arrival in the queue until it has a slot.", _SECONDS)
    self._first = histogram(
      "time_to_first_token_seconds", "TTFT: from the request's arrival in the queue to its first token.", _SECONDS
    )
    self._per_token = histogram(
      "time_per_output_token_seconds",
      "TPOT of requests with two tokens or more: (latency - TTFT) / (tokens - 1), the first token left out.",
      _SECONDS_PER_TOKEN,
    )
    self._latency = histogram("request_seconds", "From the request's arrival in the queue to its last token.", _SECONDS)

  def observe_response(self, route: str, status: int) -> None:
    """A response was begun."""
    self._responses.labels(route, str(status)).inc()

  def observe_event(self, request: GenerationRequest, tokens_before: int, event: TokenEvent) -> None:
    """A client is told this event, after `tokens_before` tokens; called in the scheduler's thread."""
    self._tokens.inc(len(event.tokens))
    if event.finish_reason is None:
      return
    self._finished.labels(event.finish_reason).inc()
    self._prompt_tokens.inc(len(request.prompt))
    queued, first, total = event.timing
    if queued is not None:
      self._queue.observe(queued)
    # What was broken off would make times look shorter than they are.
    if event.finish_reason in ("stop", "length"):
      self._first.observe(first)
      self._latency.observe(total)
      tokens = tokens_before + len(event.tokens)
      if tokens > 1:
        self._per_token.observe((total - first) / (tokens - 1))

  def render(self) -> bytes:
    """All of them in Prometheus's text format."""
    return generate_latest(self._registry)
