# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax bench matmul`: the 4-bit product against bfloat16 and against what the hardware allows."""

import concurrent.futures
import dataclasses
import datetime
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from marlin_jax.bench.operands import check, random_weights, random_x
from marlin_jax.bench.operands import expected as _reference
from marlin_jax.bench.table import write_rows
from marlin_jax.bench.timing import copies_for_cold_l2, kernel_time, measure_ceilings
from pallas_kernels import IMPLEMENTATIONS, Device, MatmulProblem, current_device, layout, matmul
from pallas_kernels.tuning import Config, config_for

BATCHES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
GROUP_SIZE = 128
XLA_INT4 = "xla_int4"
_KEY = ("k", "n", "m", "group_size", "dtype", "implementation", "device")  # of a row
_TOLERANCE = 1.05  # a figure this far beyond the measured ceilings is a measuring error


def bench_matmul(
  shapes: Sequence[tuple[int, int]],
  batches: Sequence[int],
  output: Path | None,
  tuned: Path | None = None,
  *,
  sparse24: bool = False,
  implementations: Sequence[str] | None = None,
) -> None:
  """Measures every shape at every batch size, with every kernel there is for this GPU; prints rows and writes a CSV.

  bfloat16, groups of 128, random weights that are rotated so that they are cold in L2. A result is checked against the
  reference before its time counts; the ceilings are measured in the same run. Beside the kernels stands "xla_int4":
  jnp.int4 weights that XLA scales by groups and multiplies.

  Args:
    shapes: (K, N) of the weights.
    output: the CSV to write; rows that it has of what is not measured now stay.
    tuned: a table of configs that goes before the shipped one.
    sparse24: measure the kernels of 2:4 sparse weights, too; "NAME, 2:4" in the table, their limit is their own.
    implementations: nothing but these, by their names in the table; None is all.

  Raises:
    ValueError: there is no kernel of a name for a shape on this device.
    NotImplementedError: there is no NVIDIA GPU; a CPU timing says nothing about a kernel.
    RuntimeError: a wrong result, or a time beyond the hardware's ceilings.
  """
  device = current_device()
  if device.platform != "cuda":
    raise NotImplementedError(f"bench measures kernels on an NVIDIA GPU, and this is {device.kind}: nothing measured")
  bytes_per_second, flops_per_second = measure_ceilings()
  print(f"{device.kind}: reads {bytes_per_second / 1e12:.2f} TB/s, multiplies {flops_per_second / 1e12:.0f} TFLOP/s")
  print("     K      N     M  kernel              us  limit us of limit  bf16 us speed-up  error")
  rows = []
  for k, n in shapes:
    xs = [random_x(_problem(m, n, k)) for m in batches]
    dense = _dense(k, n)
    contestants = _contestants(k, n, device, tuned, sparse24, implementations)
    # Before anything is measured: compiling runs programs on the GPU too, to choose among them.
    products = _compile(jnp.dot, xs, dense[0])
    compiled = [_compile(contestant.function, xs, *contestant.weights[0]) for contestant in contestants]
    for i, (m, x) in enumerate(zip(batches, xs, strict=True)):
      bf16_time = kernel_time(products[i], [(x, w) for w in dense])
      for c, programs in zip(contestants, compiled, strict=True):
        problem = _problem(m, n, k, sparse24=c.sparse24)
        limit = max(problem.bytes / bytes_per_second, problem.flops / flops_per_second)
        what = f"{c.label}, K={k} N={n} M={m}"
        try:
          error = check(np.asarray(programs[i](x, *c.weights[0])), np.asarray(_reference(x, *c.packed)))
        except ArithmeticError as wrong:
          raise RuntimeError(f"{what}: {wrong}") from None
        time = kernel_time(programs[i], [(x, *w) for w in c.weights])
        if time * _TOLERANCE < limit:
          raise RuntimeError(f"{what}: {time * 1e6:.1f} us is below the limit, {limit * 1e6:.1f} us")
        config = "" if c.label == XLA_INT4 else _text(config_for(c.implementation, problem, device, tuned=tuned))
        rows.append(
          dict(
            k=k,
            n=n,
            m=m,
            group_size=GROUP_SIZE,
            dtype="bfloat16",
            implementation=c.label,
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
      write_rows(output, rows, key=_KEY)
  if len(shapes) > 1:
    print("\n".join(_sums(rows)))


class Contestant(NamedTuple):
  """A kernel, or XLA's own product, and what it multiplies.

  Attributes:
    label: its name in the table.
    weights: what `function` takes after x, as often as it takes to be cold in L2.
    packed: the first of them as the reference takes it.
  """

  label: str
  implementation: str
  sparse24: bool
  function: Callable[..., Array]
  weights: list[tuple[Array | None, ...]]
  packed: tuple[Array | None, ...]


def _contestants(
  k: int, n: int, device: Device, tuned: Path | None, sparse24: bool, names: Sequence[str] | None
) -> list[Contestant]:
  """All kernels for weights of this shape on the device, and XLA's int4; or those of these names."""
  found = []
  for sparse in (False, True)[: 1 + sparse24]:
    problem = _problem(1, n, k, sparse24=sparse)
    weights = random_weights(problem)
    for name, reason in IMPLEMENTATIONS.items():
      if name == "reference" or reason(problem, device):
        continue
      label = f"{name.removesuffix('24')}, 2:4" if sparse else name
      function = functools.partial(matmul, implementation=name, tuned=tuned)
      found.append(Contestant(label, name, sparse, function, weights, weights[0]))
    if not sparse:
      codes = [(_int4(qweight, k, n), scales) for qweight, scales in weights]
      found.append(Contestant(XLA_INT4, XLA_INT4, False, _xla_int4, codes, weights[0]))
  for name in names or ():
    if name not in (labels := [contestant.label for contestant in found]):
      raise ValueError(f"implementations={names}: {name!r} must be one of {labels}")
  return [contestant for contestant in found if names is None or contestant.label in names]


def _problem(m: int, n: int, k: int, *, sparse24: bool = False) -> MatmulProblem:
  return MatmulProblem(m=m, n=n, k=k, group_size=GROUP_SIZE, dtype=jnp.dtype(jnp.bfloat16), sparse24=sparse24)


@functools.partial(jax.jit, static_argnames=("k", "n"))
def _int4(qweight: Array, k: int, n: int) -> Array:
  """The same codes as jnp.int4 [K, N], two in a byte, zero in the middle."""
  return (layout.unpack_codes(qweight, k, n).astype(jnp.int8) - 8).astype(jnp.int4)


def _xla_int4(x: Array, codes: Array, scales: Array) -> Array:
  """What one writes in JAX without a kernel: dequantize in x's dtype, then multiply."""
  grouped = codes.astype(x.dtype).reshape(scales.shape[0], -1, scales.shape[1])
  return jnp.dot(x, (grouped * scales[:, None]).reshape(codes.shape))


def _compile(function: Callable[..., Array], xs: Sequence[Array], *weight: Array | None) -> list[Any]:
  """The function compiled for each x, in as many threads as there are processors."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(lambda x: jax.jit(function).lower(x, *weight).compile(), xs))


def _text(config: Config) -> str:
  return " ".join(f"{field}={value}" for field, value in dataclasses.asdict(config).items())


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
    f"{row['k']:>6} {row['n']:>6} {row['m']:>5}  {row['implementation']:<15} {row['time_us']:>6} {row['limit_us']:>9} "
    f"{row['fraction_of_limit']:>8} {row['bf16_us']:>8} {row['speedup']:>8}  {row['rel_error']}"
  )
