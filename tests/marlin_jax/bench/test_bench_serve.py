# SPDX-License-Identifier: Apache-2.0
"""The load, and the server under it, with a model so small that a CPU serves it."""

import csv

import jax
import pytest

from marlin_jax.bench import serve
from marlin_jax.bench.load import Load, apply_load, percentile
from marlin_jax.bench.plot import plot
from marlin_jax.bench.serve import _line, _words, bench_serve, measure_serving
from marlin_jax.bench.shapes import random_model
from marlin_jax.bench.table import read_rows, write_rows
from marlin_jax.quantized import QuantSpec
from marlin_jax.serving.engine import ServingConfig
from pallas_kernels import Device
from tests.marlin_jax.bench.small_model import SMALL

SERVING = ServingConfig(slots=2, context=64, queue_limit=8, prefill_chunk=16)
LOAD = Load(url="http://127.0.0.1:9", model="m", vocab_size=9, rate=20.0, seconds=1, prompt_tokens=4, new_tokens=4)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured(tmp_path):
  with pytest.raises(NotImplementedError, match="nothing measured"):
    bench_serve(
      "small",
      SMALL,
      [None],
      [1.0],
      seconds=1,
      overload=0,
      prompt_tokens=4,
      new_tokens=4,
      serving=SERVING,
      output=tmp_path / "table.csv",
    )
  assert not list(tmp_path.iterdir())


def test_every_request_is_accounted_for_at_a_low_load_and_at_too_high_a_one(tmp_path):
  model = random_model(SMALL, None)
  model.tokenizer = _words(SMALL.vocab_size)
  tests = [(2.0, 4, 0.0), (150.0, 3, 0.5)]
  low, high = measure_serving(model, tests, prompt_tokens=12, new_tokens=40, serving=SERVING)
  assert low["answered"] > 1 and low["refused"] == low["cancelled"] == low["failed"] == 0
  assert 0 < low["tpot_ms"] < low["ttft_p99_ms"] and 0 < low["mean_batch"] <= 2
  # Both slots are taken nearly all the time, and most clients find the queue full.
  assert high["refused"] > 10 and high["answered"] > 0 and high["failed"] == 0
  assert 1.5 < high["mean_batch"] <= 2
  assert low["recompilations"] == high["recompilations"] == 0
  assert high["device_growth_mb"] < 1
  others = dict(model="small", weights="bf16", bare_step_ms=1.0, tpot_over_step=1.0, device="cpu", jax_version="0")
  rows = [others | row for row in (low, high)]
  assert f"{low['answered']:>9}" in _line(rows[0])
  write_rows(tmp_path / "of" / "table.csv", rows)
  with (tmp_path / "of" / "table.csv").open() as file:
    assert [int(row["refused"]) for row in csv.DictReader(file)] == [0, high["refused"]]
  plot(tmp_path / "of" / "table.csv", tmp_path / "picture.png", "serve")
  assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_keeps_what_a_run_does_not_measure(tmp_path, monkeypatch):
  steps = iter((10.0, 12.0, 10.0))

  def measured(model, tests, **settings):
    for rate, seconds, _ in tests:
      times = dict.fromkeys(("ttft_ms", "ttft_p99_ms", "tpot_ms", "tpot_p99_ms"), 1.0)
      counts = dict.fromkeys(("answered", "refused", "cancelled", "failed"), seconds)
      yield (
        dict(slots=2, context=64, prompt_tokens=4, new_tokens=4, requests_per_second=rate)
        | counts
        | times
        | {"mean_batch": 1.0}
      )

  monkeypatch.setattr(serve, "current_device", lambda: Device(platform="cuda", kind="a GPU", num_sms=1))
  monkeypatch.setattr(serve, "measure_decode", lambda *_: {"step_ms": next(steps)})
  monkeypatch.setattr(serve, "measure_serving", measured)

  def table(spec, rates, seconds, overload):
    settings = dict(seconds=seconds, overload=overload, prompt_tokens=4, new_tokens=4, serving=SERVING)
    bench_serve("small", SMALL, [spec], rates, output=tmp_path / "table.csv", **settings)
    rows = read_rows(tmp_path / "table.csv")
    return [(row["weights"], row["load"], row["requests_per_second"], row["answered"]) for row in rows]

  first = [("bf16", "1/s", "1", "5"), ("bf16", "2.5/s", "2.5", "5"), ("bf16", "overload", "100", "6")]
  assert table(None, [1.0, 2.5], 5, 6) == first
  # The step takes longer now, and the overload is still the overload.
  second = [first[0], ("bf16", "2.5/s", "2.5", "7"), ("bf16", "overload", "83.33", "8")]
  assert table(None, [2.5], 7, 8) == second
  assert table(QuantSpec(group_size=32), [2.5], 9, 0) == [*second, ("4-bit", "2.5/s", "2.5", "9")]


def test_a_server_that_is_not_there_fails_every_request():
  outcome = apply_load(LOAD)
  assert outcome.answered == outcome.refused == outcome.cancelled == 0
  assert set(outcome.failures) == {"ConnectionError"}


@pytest.mark.parametrize("field, value", [("rate", 0.0), ("seconds", 0), ("new_tokens", -1), ("cancelled", 1.5)])
def test_nonsense_is_refused(field, value):
  fields = {name: getattr(LOAD, name) for name in Load.__slots__} | {field: value}
  with pytest.raises(ValueError, match=f"{field}={value} must be"):
    Load(**fields)


def test_percentiles_are_of_what_there_is():
  assert percentile(tuple(float(i) for i in range(101)), 99) == 99
  assert percentile((3.0,), 50) == 3
  assert percentile((), 50) != percentile((), 50)
