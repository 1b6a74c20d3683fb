# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax bench model`: a whole model's prefill and decode, bfloat16 against 4 bits, and what a step must read."""

import datetime
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np

from marlin_jax.bench.profile import profile
from marlin_jax.bench.shapes import abstract_model, nbytes, random_model
from marlin_jax.bench.table import write_rows
from marlin_jax.bench.timing import measure_ceilings
from marlin_jax.generation.programs import Choice, DecodeState, compile_ahead, decode, prefill
from marlin_jax.generation.weights import split
from marlin_jax.models.config import ModelConfig
from marlin_jax.models.decoder import Decoder
from marlin_jax.quantized import QuantSpec
from pallas_kernels import current_device

BATCHES = (1, 4, 16, 64, 128)
_KEY = ("model", "weights", "group_size", "head", "batch", "prompt_tokens", "new_tokens", "device")  # of a row
_LONGEST_CHUNK = 32  # steps between two visits to the host
_ROUNDS = 3
_CHOICE = Choice(settings=None, eos=np.full(4, -1, np.int32))  # greedy, and no token ends a row


def bench_model(
  name: str,
  config: ModelConfig,
  specs: Sequence[QuantSpec | None],
  batches: Sequence[int],
  *,
  prompt_tokens: int,
  new_tokens: int,
  quantize_head: bool = False,
  profiled: bool = False,
  output: Path | None = None,
) -> None:
  """Measures the model with random weights in every precision at every batch size; prints rows and writes them
  into a CSV, where rows of what is not measured now stay.

  The programs are those of `generate_tokens`, greedy. A decode step's time is wall time, host and gaps included, of all
  tokens but the first over their number, the median of three runs. Its floor is the longer of reading its bytes once
  (weights, and keys and values up to the mean position) at the bandwidth measured in this run, and of its dense
  layers' arithmetic at the rate measured in this run. A model that does not fit the GPU is left out, and that is said.

  Args:
    name: of the model, for the table.
    specs: the precisions; None is bfloat16.
    quantize_head: once more in each precision but bfloat16, with the output head in it, too.
    profiled: print where a decode step's time goes, too.

  Raises:
    NotImplementedError: there is no NVIDIA GPU; a CPU timing says nothing about one.
    ValueError: a number of tokens or a batch is below 1 (new_tokens below 2), or the context is too short for them.
  """
  device = current_device()
  if device.platform != "cuda":
    raise NotImplementedError(f"bench measures models on an NVIDIA GPU, and this is {device.kind}: nothing measured")
  if min(prompt_tokens, *batches) < 1 or new_tokens < 2:
    raise ValueError(f"{prompt_tokens=} and {batches=} must be at least 1, {new_tokens=} at least 2")
  if prompt_tokens + new_tokens > config.max_position_embeddings:
    raise ValueError(f"{prompt_tokens=} + {new_tokens=} must be at most {config.max_position_embeddings}, the context")
  ceilings = measure_ceilings()
  print(f"{device.kind}: reads {ceilings[0] / 1e12:.2f} TB/s, multiplies {ceilings[1] / 1e12:.0f} TFLOP/s")
  print("weights          batch  step ms  floor  ratio  tokens/s  speed-up  first ms  compile s")
  rows: list[dict[str, Any]] = []
  variants = [(spec, False) for spec in specs]
  variants += [(spec, True) for spec in specs if quantize_head and spec is not None]
  for spec, head in variants:
    weights = "bf16" if spec is None else f"{spec.bits}-bit" + (", 2:4" if spec.sparse24 else "")
    size = nbytes(abstract_model(config, spec, quantize_head=head))
    room = jax.local_devices()[0].memory_stats()["bytes_limit"]
    if size > 0.95 * room:
      print(f"{weights}  {size / 1e9:.1f} GB of weights do not fit {room / 1e9:.1f} GB: left out")
      continue
    model = random_model(config, spec, quantize_head=head)
    for batch in batches:
      measured = measure_decode(model, batch, prompt_tokens, new_tokens, profiled=profiled)
      bound = step_floor(model, batch, prompt_tokens + new_tokens // 2, *ceilings)
      same = [row for row in rows if row["weights"] == "bf16" and row["batch"] == batch]
      step = measured["step_ms"]
      rows.append(
        dict(
          model=name,
          weights=weights,
          group_size=None if spec is None else spec.group_size,
          head=weights if head else "bf16",
          batch=batch,
          prompt_tokens=prompt_tokens,
          new_tokens=new_tokens,
          **measured,
          floor_ms=bound * 1e3,
          step_over_floor=step / (bound * 1e3),
          tokens_per_second=batch / step * 1e3,
          speedup=same[0]["step_ms"] / step if same else math.nan,
          weights_gb=size / 1e9,
          bytes_per_second=ceilings[0],
          chunk=_chunk(new_tokens),
          device=device.kind,
          jax_version=jax.__version__,
          date=datetime.date.today().isoformat(),
        )
      )
      print(_line(rows[-1]), flush=True)
      if output is not None:
        write_rows(output, rows, key=_KEY, digits=4)
    del model


def step_floor(model: Decoder, batch: int, position: int, bytes_per_second: float, flops_per_second: float) -> float:
  """Seconds that no decode step of `batch` rows at `position` can beat on hardware of these ceilings."""
  config = model.config
  params = sum(math.prod(shape) for shape in _dense_shapes(config))
  read = nbytes(model)
  if not config.tie_word_embeddings:
    read -= (config.vocab_size - batch) * config.hidden_size * model.dtype.itemsize  # a row a token, not the table
  keys = sum(min(position, window or position) for window in config.sliding_windows)
  read += 2 * batch * keys * config.num_kv_heads * config.head_dim * model.dtype.itemsize
  return max(read / bytes_per_second, 2 * batch * params / flops_per_second)


def _dense_shapes(config: ModelConfig) -> list[tuple[int, int]]:
  hidden, heads, kv_heads = (
    config.hidden_size,
    config.num_heads * config.head_dim,
    config.num_kv_heads * config.head_dim,
  )
  layer = [(hidden, heads + 2 * kv_heads), (heads, hidden), (hidden, 3 * config.intermediate_size)]
  return layer * config.num_layers + [(hidden, config.vocab_size)]


def _chunk(new_tokens: int) -> int:
  """The longest chunk that divides the steps, so that all steps are asked for."""
  return max(chunk for chunk in range(1, _LONGEST_CHUNK + 1) if (new_tokens - 1) % chunk == 0)


def measure_decode(
  model: Decoder, batch: int, prompt_tokens: int, new_tokens: int, *, profiled: bool = False
) -> dict[str, float]:
  """Milliseconds of a decode step and of the first token, wall time, and seconds that compiling took."""
  structure, weights = split(model)
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt_tokens), np.int32)
  lengths = np.full(batch, prompt_tokens, np.int32)
  chunk = _chunk(new_tokens)
  length = 1 << (prompt_tokens + new_tokens - 1).bit_length()

  arguments = (structure, weights, tokens, lengths, np.uint32(0), _CHOICE)

  def first() -> tuple[DecodeState, Future | None]:
    compiling = compile_ahead(*arguments, cache_length=length, chunk=chunk)
    state = prefill(*arguments, cache_length=length)
    np.asarray(state.token)
    return state, compiling

  def rest(state: DecodeState, compiling: Future | None) -> None:
    if compiling is not None:
      compiling.result()
    handed_out = None
    for _ in range((new_tokens - 1) // chunk):
      state, emitted, _ = decode(structure, weights, state, _CHOICE, chunk=chunk)
      if handed_out is not None:  # after the next chunk is begun, as in generate_tokens
        np.asarray(handed_out)
      handed_out = emitted
    np.asarray(handed_out)

  first_times, rest_times = [], []
  for _ in range(1 + _ROUNDS):
    began = time.perf_counter()
    begun = first()
    first_times.append(time.perf_counter() - began)
    began = time.perf_counter()
    rest(*begun)
    rest_times.append(time.perf_counter() - began)
  first_time, rest_time = statistics.median(first_times[1:]), statistics.median(rest_times[1:])
  if profiled:
    states = [first()[0], first()[0]]
    print(profile(lambda: decode(structure, weights, states.pop(), _CHOICE, chunk=chunk), chunk))
  return dict(
    step_ms=rest_time / (new_tokens - 1) * 1e3,
    first_token_ms=first_time * 1e3,
    # The first calls compile.
    compile_s=first_times[0] + rest_times[0] - first_time - rest_time,
  )


def _line(row: dict[str, Any]) -> str:
  weights = row["weights"] + ("" if row["head"] == "bf16" else ", head")
  return (
    f"{weights:<15} {row['batch']:>6} {row['step_ms']:>8.3f} {row['floor_ms']:>6.3f} "
    f"{row['step_over_floor']:>6.2f} {row['tokens_per_second']:>9.0f} {row['speedup']:>9.2f} "
    f"{row['first_token_ms']:>9.2f} {row['compile_s']:>10.1f}"
  )
