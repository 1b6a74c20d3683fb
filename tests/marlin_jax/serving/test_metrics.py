# SPDX-License-Identifier: Apache-2.0
import pytest

from marlin_jax.serving.metrics import Metrics
from marlin_jax.serving.request import GenerationRequest, Timing, TokenEvent
from marlin_jax.serving.scheduler import Scheduler

REQUEST = GenerationRequest(prompt=(1, 2, 3), max_new_tokens=9)


def sums(metrics):
  """name -> value, of all lines without labels"""
  lines = [line.split() for line in metrics.render().decode().splitlines() if line[0] != "#" and "{" not in line]
  return {name.removeprefix("marlin_jax_"): float(value) for name, value in lines}


def test_time_per_output_token_leaves_the_first_token_out(scripted):
  metrics = Metrics(Scheduler(scripted()))
  metrics.observe_event(REQUEST, 0, TokenEvent([4], None, None))
  metrics.observe_event(REQUEST, 1, TokenEvent([4, 4, 4, 4], None, "length", None, Timing(0.25, 1.0, 3.0)))
  values = sums(metrics)
  assert values["time_per_output_token_seconds_sum"] == pytest.approx((3.0 - 1.0) / 4)
  assert values["time_to_first_token_seconds_sum"] == 1.0 and values["request_seconds_sum"] == 3.0
  assert values["queue_seconds_sum"] == 0.25
  assert (values["prompt_tokens_total"], values["generation_tokens_total"]) == (3, 5)


@pytest.mark.parametrize("reason", ["cancelled", "error"])
def test_what_is_broken_off_counts_but_has_no_times(scripted, reason):
  metrics = Metrics(Scheduler(scripted()))
  metrics.observe_event(REQUEST, 0, TokenEvent([], None, reason, None, Timing(None, None, 3.0)))
  values = sums(metrics)
  assert values["request_seconds_count"] == values["queue_seconds_count"] == 0
  assert f'requests_finished_total{{reason="{reason}"}} 1.0' in metrics.render().decode()


def test_one_token_has_no_time_per_output_token(scripted):
  metrics = Metrics(Scheduler(scripted()))
  metrics.observe_event(REQUEST, 0, TokenEvent([4], None, "stop", None, Timing(0.0, 1.0, 1.0)))
  assert sums(metrics)["time_per_output_token_seconds_count"] == 0


def test_the_cache_in_use_is_a_share_of_all_positions(scripted):
  engine = scripted(slots=2, context=50, prefill_chunk=16)
  scheduler = Scheduler(engine)
  scheduler.submit([GenerationRequest(prompt=(1,) * 20, max_new_tokens=10)], lambda *_: None)
  scheduler._step()  # what of the prompt is no whole chunk
  assert sums(Metrics(scheduler))["kv_cache_usage_ratio"] == pytest.approx(4 / 100)
  scheduler._step()  # the rest of the prompt and its first token
  assert sums(Metrics(scheduler))["kv_cache_usage_ratio"] == pytest.approx((20 + 1) / 100)
  scheduler._step()  # a chunk of four
  assert sums(Metrics(scheduler))["kv_cache_usage_ratio"] == pytest.approx((20 + 5) / 100)


def test_two_servers_in_one_process_count_apart(scripted):
  first, second = (Metrics(Scheduler(scripted())) for _ in range(2))
  first.observe_response("/health", 200)
  assert b'status="200"' in first.render() and b'status="200"' not in second.render()
