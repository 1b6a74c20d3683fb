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
from jaxtyping import Array

from marlin_jax.bench.timing import copies_for_cold_l2, kernel_time, measure_ceilings
from pallas_kernels import IMPLEMENTATIONS, Device, MatmulProblem, current_device, matmul, qweight_shape
from pallas_kernels.reference import matmul_reference
from pallas_kernels.tuning import config_for

# (K, N): a large MLP, and the layers of a 7B model.
SHAPES = ((8192, 28672), (4096, 12288), (14336, 4096), (4096, 4096))
BATCHES = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
GROUP_SIZE = 128
_TOLERANCE = 1.05  # a figure this far beyond the measured ceilings is a measuring error
_MAX_ERROR = 2.0**-8  # what rounding the result once to bfloat16 explains


def bench_matmul(shapes: Sequence[tuple[int, int]], batches: Sequence[int], output: Path | None) -> None:
  """Measures every shape at every batch size, with every kernel there is for this GPU; prints rows and writes a CSV.

  bfloat16, groups of 128, random weights that are rotated so that they are cold in L2. A result is checked against the
  reference before its time counts; the ceilings are measured in the same run.

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
    weights, dense = _weights(k, n), _dense(k, n)
    xs = [jax.random.normal(jax.random.key(m), (m, k), jnp.float32).astype(jnp.bfloat16) for m in batches]
    problems = [MatmulProblem(m=m, n=n, k=k, group_size=GROUP_SIZE, dtype=jnp.dtype(jnp.bfloat16)) for m in batches]
    kernels = [
      name for name, reason in IMPLEMENTATIONS.items() if name != "reference" and not reason(problems[0], device)
    ]
    # Before anything is measured: compiling runs programs on the GPU too, to choose among them.
    products = _compile(jnp.dot, xs, dense[0])
    compiled = {name: _compile(functools.partial(matmul, implementation=name), xs, *weights[0]) for name in kernels}
    for i, (x, problem) in enumerate(zip(xs, problems, strict=True)):
      limit = max(problem.bytes / bytes_per_second, problem.flops / flops_per_second)
      bf16_time = kernel_time(products[i], [(x, w) for w in dense])
      want = _reference(x.astype(jnp.float32), *weights[0])
      for name in kernels:
        what = f"{name}, K={k} N={n} M={problem.m}"
        y = compiled[name][i](x, *weights[0]).astype(jnp.float32)
        error = float(jnp.linalg.norm(y - want) / jnp.linalg.norm(want))
        if not error < _MAX_ERROR:
          raise RuntimeError(f"{what}: relative error {error:.1e} must be below {_MAX_ERROR:.1e}")
        time = kernel_time(compiled[name][i], [(x, *w) for w in weights])
        if time * _TOLERANCE < limit:
          raise RuntimeError(f"{what}: {time * 1e6:.1f} us is below the limit, {limit * 1e6:.1f} us")
        rows.append(
          dict(
            k=k,
            n=n,
            m=problem.m,
            group_size=GROUP_SIZE,
            dtype="bfloat16",
            implementation=name,
            config=_config(name, problem, device),
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
  if output is not None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
      writer = csv.DictWriter(file, fieldnames=list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)


def _compile(function: Callable[..., Array], xs: Sequence[Array], *weight: Array) -> list[Any]:
  """The function compiled for each x, in as many threads as there are processors."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(lambda x: jax.jit(function).lower(x, *weight).compile(), xs))


def _config(name: str, problem: MatmulProblem, device: Device) -> str:
  config = config_for(name, problem, device)
  return " ".join(f"{field}={value}" for field, value in dataclasses.asdict(config).items())


def _weights(k: int, n: int) -> list[tuple[Array, Array]]:
  """Packed random weights, as many as it takes to be cold in L2; every code is as likely as every other."""
  weights = []
  for i in range(copies_for_cold_l2(k * n // 2)):
    bits, sizes = jax.random.split(jax.random.key(i))
    qweight = jax.lax.bitcast_convert_type(jax.random.bits(bits, qweight_shape(k, n), jnp.uint16), jnp.int16)
    scales = jax.random.uniform(sizes, (k // GROUP_SIZE, n), jnp.float32, 0.005, 0.02).astype(jnp.bfloat16)
    weights.append((qweight, scales))
  return weights


def _dense(k: int, n: int) -> list[Array]:
  keys = (jax.random.key(i) for i in range(copies_for_cold_l2(2 * k * n)))
  return [jax.random.normal(key, (k, n), jnp.float32).astype(jnp.bfloat16) for key in keys]


@jax.jit
def _reference(x: Array, qweight: Array, scales: Array) -> Array:
  return matmul_reference(x, qweight, scales)


def _line(row: dict[str, Any]) -> str:
  return (
    f"{row['k']:>6} {row['n']:>6} {row['m']:>5}  {row['implementation']:<9} {row['time_us']:>6} {row['limit_us']:>9} "
    f"{row['fraction_of_limit']:>8} {row['bf16_us']:>8} {row['speedup']:>8}  {row['rel_error']}"
  )
