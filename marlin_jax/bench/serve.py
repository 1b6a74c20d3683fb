# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax bench serve`: what clients of the server wait for, bfloat16 against 4 bits, at growing load."""

import asyncio
import contextlib
import datetime
import os
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import tokenizers
import uvicorn

from marlin_jax.bench.load import Load, apply_load, percentile
from marlin_jax.bench.model import measure_decode
from marlin_jax.bench.shapes import random_model
from marlin_jax.bench.table import write_rows
from marlin_jax.models.config import ModelConfig
from marlin_jax.models.decoder import Decoder
from marlin_jax.quantized import QuantSpec
from marlin_jax.serving.engine import Engine, ServingConfig
from marlin_jax.serving.http import create_app
from marlin_jax.serving.scheduler import Scheduler
from marlin_jax.serving.server import DRAIN_SECONDS, served_model, uvicorn_config
from marlin_jax.tokenizer import Tokenizer
from pallas_kernels import current_device

# Of a row. The rate of an overload follows from what was measured, so its name stands for it.
_KEY = ("model", "weights", "group_size", "load", "slots", "context", "prompt_tokens", "new_tokens", "device")
_CANCELLED = 0.1  # of the clients that come when there are too many


def bench_serve(
  name: str,
  config: ModelConfig,
  specs: Sequence[QuantSpec | None],
  rates: Sequence[float],
  *,
  seconds: int,
  overload: int,
  prompt_tokens: int,
  new_tokens: int,
  serving: ServingConfig,
  output: Path | None = None,
) -> None:
  """Serves the model with random weights over HTTP and applies load to it; prints rows and writes them into a CSV,
  where rows of what is not measured now stay.

  Clients are Locust's, on the same machine, with greedy streamed completions that arrive as a Poisson process. TTFT and
  TPOT are what they see, the mean batch and the recompilations are the server's own. Beside TPOT stands the time of a
  step of the bare loop of `bench model` with as many rows as there are slots.

  Args:
    name: of the model, for the table.
    specs: the precisions; None is bfloat16.
    rates: requests a second.
    seconds: of each rate.
    overload: seconds of twice the rate that would fill all slots, with one client in ten leaving early; 0 for none.

  Raises:
    NotImplementedError: there is no NVIDIA GPU; a CPU timing says nothing about one.
    ValueError: a setting out of range.
  """
  device = current_device()
  if device.platform != "cuda":
    raise NotImplementedError(f"bench measures serving on an NVIDIA GPU, and this is {device.kind}: nothing measured")
  print("weights   req/s  answered refused  left failed  batch  TTFT ms (p99)  TPOT ms (p99)  bare step ms  ratio")
  rows: list[dict[str, Any]] = []
  for spec in specs:
    weights = "bf16" if spec is None else f"{spec.bits}-bit"
    model = random_model(config, spec)
    model.tokenizer = _words(config.vocab_size)
    step = measure_decode(model, serving.slots, prompt_tokens, new_tokens)["step_ms"] / 1e3
    tests = {f"{rate:g}/s": (rate, seconds, 0.0) for rate in rates}
    if overload:
      tests["overload"] = (2 * serving.slots / (new_tokens * step), overload, _CANCELLED)
    measured = measure_serving(
      model, list(tests.values()), prompt_tokens=prompt_tokens, new_tokens=new_tokens, serving=serving
    )
    for load, row in zip(tests, measured, strict=True):
      rows.append(
        dict(model=name, weights=weights, group_size=None if spec is None else spec.group_size, load=load)
        | row
        | dict(
          bare_step_ms=step * 1e3,
          tpot_over_step=row["tpot_ms"] / (step * 1e3),
          device=device.kind,
          jax_version=jax.__version__,
          date=datetime.date.today().isoformat(),
        )
      )
      print(_line(rows[-1]), flush=True)
      if output is not None:
        write_rows(output, rows, key=_KEY, digits=4)
    del model


def measure_serving(
  model: Decoder,
  tests: Sequence[tuple[float, int, float]],
  *,
  prompt_tokens: int,
  new_tokens: int,
  serving: ServingConfig,
) -> Iterator[dict[str, Any]]:
  """A row for each (requests a second, seconds, part that leaves), of one server that all of them meet in turn."""
  with asyncio.Runner() as runner:
    server = _running(model, serving)
    url, scheduler = runner.run(server.__aenter__())
    try:
      for rate, seconds, cancelled in tests:
        load = Load(
          url=url,
          model="model",
          vocab_size=model.config.vocab_size,
          rate=rate,
          seconds=seconds,
          prompt_tokens=prompt_tokens,
          new_tokens=new_tokens,
          cancelled=cancelled,
        )
        yield runner.run(_measure(load, scheduler, serving))
    finally:
      runner.run(server.__aexit__(None, None, None))


@contextlib.asynccontextmanager
async def _running(model: Decoder, serving: ServingConfig) -> AsyncIterator[tuple[str, Scheduler]]:
  """The server as `marlin-jax serve` runs it, ready, on a free port of this machine."""
  with socket.create_server(("127.0.0.1", 0)) as listener:
    scheduler = Scheduler(Engine(model, serving))
    server = uvicorn.Server(uvicorn_config(create_app(served_model(model, "model", scheduler), api_key=None)))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    scheduler.start(wait=False)
    while not scheduler.ready:
      if scheduler.failure is not None:
        raise RuntimeError(scheduler.failure)
      await asyncio.sleep(0.05)
    try:
      yield f"http://127.0.0.1:{listener.getsockname()[1]}", scheduler
    finally:
      await asyncio.to_thread(scheduler.drain, DRAIN_SECONDS)
      scheduler.stop()
      server.should_exit = True
      await task


async def _measure(load: Load, scheduler: Scheduler, serving: ServingConfig) -> dict[str, Any]:
  before, host, device = scheduler.stats, _host_bytes(), _device_bytes()
  outcome = await asyncio.to_thread(apply_load, load)
  after = scheduler.stats
  chunks = after.decode_chunks - before.decode_chunks
  return dict(
    slots=serving.slots,
    context=serving.context,
    prompt_tokens=load.prompt_tokens,
    new_tokens=load.new_tokens,
    requests_per_second=load.rate,
    seconds=load.seconds,
    answered=outcome.answered,
    refused=outcome.refused,
    cancelled=outcome.cancelled,
    failed=len(outcome.failures),
    mean_batch=(after.decoded_rows - before.decoded_rows) / max(1, chunks),
    ttft_ms=1e3 * percentile(outcome.ttft, 50),
    ttft_p99_ms=1e3 * percentile(outcome.ttft, 99),
    tpot_ms=1e3 * percentile(outcome.tpot, 50),
    tpot_p99_ms=1e3 * percentile(outcome.tpot, 99),
    recompilations=after.recompilations,
    host_growth_mb=(_host_bytes() - host) / 1e6,
    device_growth_mb=(_device_bytes() - device) / 1e6,
  )


def _host_bytes() -> int:
  return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _device_bytes() -> int:
  return sum(array.nbytes for array in jax.live_arrays())


def _words(vocab_size: int) -> Tokenizer:
  """A word for every token of a model that has no text."""
  words = tokenizers.models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0")
  return Tokenizer({"tokenizer.json": tokenizers.Tokenizer(words).to_str()})


def _line(row: dict[str, Any]) -> str:
  ttft, tpot = (f"{row[f'{t}_ms']:.1f} ({row[f'{t}_p99_ms']:.1f})" for t in ("ttft", "tpot"))
  return (
    f"{row['weights']:<7} {row['requests_per_second']:>7.1f} {row['answered']:>9} {row['refused']:>7} "
    f"{row['cancelled']:>5} {row['failed']:>6} {row['mean_batch']:>6.1f}  {ttft:<14} {tpot:<14} "
    f"{row['bare_step_ms']:>12.2f} {row['tpot_over_step']:>6.2f}"
  )
