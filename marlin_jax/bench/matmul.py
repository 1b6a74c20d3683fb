# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax bench matmul`: the 4-bit product against bfloat16 and against what the hardware allows."""

import concurrent.futures
import csv
import dataclasses
import datetime
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from marlin_jax.bench.operands import check, random_weights, random_x
from marlin_jax.bench.operands import expected as _reference
from marlin_jax.bench.timing import copies_for_cold_l2, kernel_time, measure_ceilings
from pallas_kernels import IMPLEMENTATIONS, MatmulProblem, current_device, layout, matmul
from pallas_kernels.tuning import Config, config_for

BATCHES = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
GROUP_SIZE = 128
XLA_INT4 = "xla_int4"
_TOLERANCE = 1.05  # a figure this far beyond the measured ceilings is a measuring error


def bench_matmul(
  shapes: Sequence[tuple[int, int]], batches: Sequence[int], output: Path | None, tuned: Path | None = None
) -> None:
  """Measures every shape at every batch size, with every kernel there is for this GPU; prints rows and writes a CSV.

  bfloat16, groups of 128, random weights that are rotated so that they are cold in L2. A result is checked against the
  reference before its time counts; the ceilings are measured in the same run. Beside the kernels stands "xla_int4":
  jnp.int4 weights that XLA scales by groups and multiplies.

  Args:
    shapes: (K, N) of the weights.
    output: the CSV to write.
    tuned: a table of configs that goes before the shipped one.

  Raises:
    NotImplementedError: there is no NVIDIA GPU; a CPU timing says nothing about a kernel.
    RuntimeError: a wrong result, or a time beyond the hardware's ceilings.
  """
  device = current_device()
  if device.platform != "cuda":
    raise NotImplementedError(f"bench measures kernels on an NVIDIA GPU, and this is {device.kind}: nothing measured")
  bytes_per_second, flops_per_second = measure_ceilings()
  print(f"{device.kind}: reads {bytes_per_second / 1e12:.2f} TB/s, multiplies {flops_per_second / 1e12:.0f} TFLOP/s")
  print("     K      N     M  kernel        us  limit us of limit  bf16 us speed-up  error")
  rows = []
  for k, n in shapes:
    problems = [MatmulProblem(m=m, n=n, k=k, group_size=GROUP_SIZE, dtype=jnp.dtype(jnp.bfloat16)) for m in batches]
    packed, dense = _weights(k, n), _dense(k, n)
    xs = [random_x(problem) for problem in problems]
    kernels = [
      name for name, reason in IMPLEMENTATIONS.items() if name != "reference" and not reason(problems[0], device)
    ]
    weights = dict.fromkeys(kernels, packed) | {XLA_INT4: [(_int4(q, k, n), scales) for q, scales in packed]}
    functions = {name: functools.partial(matmul, implementation=name, tuned=tuned) for name in kernels}
    # Before anything is measured: compiling runs programs on the GPU too, to choose among them.
    products = _compile(jnp.dot, xs, dense[0])
    compiled = {
      name: _compile(function, xs, *weights[name][0]) for name, function in (functions | {XLA_INT4: _xla_int4}).items()
    }
    for i, (x, problem) in enumerate(zip(xs, problems, strict=True)):
      limit = max(problem.bytes / bytes_per_second, problem.flops / flops_per_second)
      bf16_time = kernel_time(products[i], [(x, w) for w in dense])
      want = np.asarray(_reference(x, *packed[0]))
      for name, function in compiled.items():
        what = f"{name}, K={k} N={n} M={problem.m}"
        try:
          error = check(np.asarray(function[i](x, *weights[name][0])), want)
        except ArithmeticError as wrong:
          raise RuntimeError(f"{what}: {wrong}") from None
        time = kernel_time(function[i], [(x, *w) for w in weights[name]])
        if time * _TOLERANCE < limit:
          raise RuntimeError(f"{what}: {time * 1e6:.1f} us is below the limit, {limit * 1e6:.1f} us")
        config = "" if name == XLA_INT4 else _text(config_for(name, problem, device, tuned=tuned))
        rows.append(
          dict(
            k=k,
            n=n,
            m=problem.m,
            group_size=GROUP_SIZE,
            dtype="bfloat16",
            implementation=name,
            config=config,
            time_us=f"{time * 1e6:.2f}",
            limit_us=f"{limit * 1e6:.2f}",
            fraction_of_limit=f"{limit / time:.3f}",
            bf16_us=f"{bf16_time * 1e6:.2f}",
            speedup=f"{bf16_time / time:.2f}",
            rel_error=f"{error:.1e}",
            device=device.kind,
            jax_version=jax.__version__,
            date=datetime.date.today().isoformat(),
          )
        )
        print(_line(rows[-1]), flush=True)
    if output is not None:  # after every shape, so that a run that is cut short leaves what it has
      _write(output, rows)
  if len(shapes) > 1:
    print("\n".join(_sums(rows)))


def _write(output: Path, rows: Sequence[dict[str, Any]]) -> None:
  output.parent.mkdir(parents=True, exist_ok=True)
  with output.open("w", newline="") as file:
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


@functools.partial(jax.jit, static_argnames=("k", "n"))
def _int4(qweight: Array, k: int, n: int) -> Array:
  """The same codes as jnp.int4 [K, N], two in a byte, zero in the middle."""
  return (layout.unpack_codes(qweight, k, n).astype(jnp.int8) - 8).astype(jnp.int4)


def _xla_int4(x: Array, codes: Array, scales: Array) -> Array:
  """What one writes in JAX without a kernel: dequantize in x's dtype, then multiply."""
  grouped = codes.astype(x.dtype).reshape(scales.shape[0], -1, scales.shape[1])
  return jnp.dot(x, (grouped * scales[:, None]).reshape(codes.shape))


def _compile(function: Callable[..., Array], xs: Sequence[Array], *weight: Array) -> list[Any]:
  """The function compiled for each x, in as many threads as there are processors."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(lambda x: jax.jit(function).lower(x, *weight).compile(), xs))


def _text(config: Config) -> str:
  return " ".join(f"{field}={value}" for field, value in dataclasses.asdict(config).items())


def _weights(k: int, n: int) -> list[tuple[Array, ...]]:
  return random_weights(MatmulProblem(m=1, n=n, k=k, group_size=GROUP_SIZE, dtype=jnp.dtype(jnp.bfloat16)))


def _dense(k: int, n: int) -> list[Array]:
  keys = (jax.random.key(i) for i in range(copies_for_cold_l2(2 * k * n)))
  return [jax.random.normal(key, (k, n), jnp.float32).astype(jnp.bfloat16) for key in keys]


def _sums(rows: Sequence[dict[str, Any]]) -> list[str]:
  """A line for every batch size and kernel: the time of all shapes one after the other, as a model's layers take it."""
  sums: dict[tuple[int, str], list[float]] = {}
  for row in rows:
    total = sums.setdefault((row["m"], row["implementation"]), [0.0, 0.0])
    total[0] += float(row["time_us"])
    total[1] += float(row["bf16_us"])
  return [
    f"all shapes, M={m}: {name} {time:.1f} us, bfloat16 {bf16:.1f} us, speed-up {bf16 / time:.2f}"
    for (m, name), (time, bf16) in sums.items()
  ]


def _line(row: dict[str, Any]) -> str:
  return (
    f"{row['k']:>6} {row['n']:>6} {row['m']:>5}  {row['implementation']:<9} {row['time_us']:>6} {row['limit_us']:>9} "
    f"{row['fraction_of_limit']:>8} {row['bf16_us']:>8} {row['speedup']:>8}  {row['rel_error']}"
  )
