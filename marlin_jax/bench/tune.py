# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax tune`: measures the configs that could be fastest on the card at hand and writes a table of the best.

Candidates are compiled in as many threads as there are processors; then each is checked against the reference, timed
once, dropped if it is far behind, and timed in earnest. A candidate that does not compile, runs wrong or changes its
result is said and skipped. A kernel that waits for ever cannot be interrupted: the configs refuse at construction what
could (more registers or shared memory than the launch has), and if one does wait, the process says which and ends; what
was tuned before is in the table.
"""

import dataclasses
import functools
import multiprocessing.pool
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from marlin_jax.bench.operands import check, expected, random_weights, random_x
from marlin_jax.bench.timing import kernel_time
from pallas_kernels import IMPLEMENTATIONS, Device, MatmulProblem, current_device
from pallas_kernels.heuristics import candidates
from pallas_kernels.hopper_matmul import matmul_hopper
from pallas_kernels.triton_dequantize import matmul_dequantize
from pallas_kernels.triton_matmul import matmul_triton
from pallas_kernels.triton_matmul24 import matmul_triton24
from pallas_kernels.tuning import CONFIGS, Config, TunedRow, TunedTable, load_table, m_bucket, write_table

_KERNELS = {
  "hopper": matmul_hopper,
  "triton": matmul_triton,
  "triton24": lambda x, qweight, scales, zeros, meta, config: matmul_triton24(x, qweight, meta, scales, config=config),
  "dequantize": matmul_dequantize,
}
_FAR_BEHIND = 1.2  # times the best so far, in a single round: more than rounds differ by
_PATIENCE = 120.0  # seconds for a candidate to compile or to run; both take a few at most
_COMPILING = 0.75  # of the time there is; measuring takes the rest

Kernel = Callable[..., Array]
Timer = Callable[..., float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
  """One problem for one implementation, and the configs that could be fastest for it."""

  implementation: str
  problem: MatmulProblem
  configs: tuple[Config, ...]

  def __str__(self):
    p = self.problem
    return f"{self.implementation}{', 2:4' if p.sparse24 else ''}, K={p.k} N={p.n} M={p.m}"


def tune(
  problems: Sequence[MatmulProblem],
  output: Path,
  *,
  implementations: Sequence[str] = tuple(CONFIGS),
  most: int | None = None,
  seconds: float | None = None,
  timer: Timer = kernel_time,
) -> TunedTable:
  """Finds the fastest config of every implementation for every problem, and writes them into the table `output`.

  Rows that the table has for other problems stay. It is written after every shape of weights, so that an interrupted
  run keeps what it has.

  Args:
    problems: their m is taken up to its bucket (tuning.py), which is what a row is for.
    output: the JSON file to write, to be loaded through MARLIN_JAX_TUNED.
    most: candidates for a problem and an implementation, the most promising first; None is all of them.
    seconds: what it may take; candidates for which no time is left are left out. None is no limit.
    timer: measures a compiled kernel on argument sets.

  Raises:
    NotImplementedError: there is no NVIDIA GPU, or no implementation takes a problem.
    ValueError: `output` holds something else than a table for this device.
  """
  device = current_device()
  if device.platform != "cuda":
    raise NotImplementedError(f"tune measures kernels on an NVIDIA GPU, and this is {device.kind}: nothing tuned")
  table = load_table(output) if output.exists() else TunedTable(device=device.kind, jax_version="", rows=())
  if table.device != device.kind:
    raise ValueError(f"{output} is a table for {table.device!r}, and this is {device.kind!r}")
  shapes = tasks_by_shape(problems, device, implementations, most)
  total = sum(len(task.configs) for tasks in shapes for task in tasks)
  print(f"{device.kind}: {total} candidates for {sum(map(len, shapes))} problems", file=sys.stderr)
  end = None if seconds is None else time.monotonic() + seconds
  with tqdm(total=2 * total, unit="step", desc="compile, measure") as bar:
    for i, tasks in enumerate(shapes):
      now = time.monotonic()
      share = None if end is None else max(0.0, end - now) / (len(shapes) - i)
      rows = {row.key: row for row in (*table.rows, *_tune_shape(tasks, share, bar, timer))}
      table = TunedTable(device=device.kind, jax_version=jax.__version__, rows=tuple(rows.values()))
      write_table(output, table)
  return table


def tasks_by_shape(
  problems: Sequence[MatmulProblem], device: Device, implementations: Sequence[str], most: int | None
) -> list[list[Task]]:
  """A task for every problem and implementation that takes it; those that share weights are together."""
  shapes: dict[MatmulProblem, dict[tuple[str, int], Task]] = {}
  for problem in problems:
    problem = dataclasses.replace(problem, m=m_bucket(problem.m))
    reasons = {name: IMPLEMENTATIONS[name](problem, device) for name in implementations}
    if all(reasons.values()):
      raise NotImplementedError(f"nothing to tune for {problem} ({'; '.join(f'{n}: {r}' for n, r in reasons.items())})")
    tasks = shapes.setdefault(dataclasses.replace(problem, m=0), {})
    for name in implementations:
      if reasons[name] is None:
        configs = tuple(candidates(name, problem, device.num_sms)[:most])
        tasks[name, problem.m] = Task(implementation=name, problem=problem, configs=configs)
  return [list(tasks.values()) for tasks in shapes.values()]


def _tune_shape(tasks: Sequence[Task], seconds: float | None, bar: tqdm, timer: Timer) -> Iterator[TunedRow]:
  """The row of every task for which a candidate works. Everything is compiled before anything is measured: compiling
  may run programs on the GPU too.
  """
  start = time.monotonic()
  largest = max((task.problem for task in tasks), key=lambda problem: problem.m)
  weights = random_weights(largest)
  x = random_x(largest)
  want = np.asarray(expected(x, *weights[0]))
  kernels = _compile_all(tasks, x, weights[0], None if seconds is None else start + _COMPILING * seconds, bar)
  for task in tasks:
    sets = [(x[: task.problem.m], *weight) for weight in weights]
    times: dict[Config, float] = {}
    for config in task.configs:
      bar.update()
      # Without the heuristic's own config, the first, a row could be slower than no row.
      late = seconds is not None and time.monotonic() > start + seconds and times
      if (task, config) not in kernels or late:
        continue
      best = min(times.values(), default=None)
      try:
        with _time_limit(f"{task}, {config}"):
          taken = measure(kernels[task, config], sets, want[: task.problem.m], best, timer)
      except (ArithmeticError, RuntimeError) as error:
        bar.write(f"refused: {task}, {config}: {error}", file=sys.stderr)
        jax.block_until_ready(jnp.ones(()) + 1)  # raises if the GPU was lost with the candidate
        continue
      if taken is not None:
        times[config] = taken
    if not times:
      bar.write(f"no candidate works: {task}", file=sys.stderr)
      continue
    config = min(times, key=times.get)
    first = times.get(task.configs[0])
    beside = "" if first is None else f" (heuristic {first * 1e6:.2f})"
    bar.write(f"{task}: {times[config] * 1e6:.2f} us{beside}, {config}", file=sys.stderr)
    yield row_of(task, config, times[config])


def row_of(task: Task, config: Config, seconds: float) -> TunedRow:
  """The table's row for a task whose fastest config is `config`."""
  p = task.problem
  return TunedRow(
    implementation=task.implementation,
    m=p.m,
    k=p.k,
    n=p.n,
    group_size=p.group_size,
    bits=p.bits,
    zeros=p.zeros,
    sparse24=p.sparse24,
    dtype=p.dtype.name,
    config=config,
    time_us=round(seconds * 1e6, 2),
  )


def measure(
  kernel: Kernel,
  argument_sets: Sequence[tuple[Any, ...]],
  want: Float[np.ndarray, "M N"],
  best: float | None,
  timer: Timer,
) -> float | None:
  """Seconds that a candidate takes, or None if it is far behind `best`, those of the best so far.

  Args:
    argument_sets: one of every weight to rotate over.
    want: the reference's result for the first of them.

  Raises:
    ArithmeticError: the candidate's result is not `want`, or not the same after the timing.
  """
  y = np.asarray(kernel(*argument_sets[0]))
  check(y, want)
  taken = timer(kernel, argument_sets, rounds=1)
  if best is not None and taken > _FAR_BEHIND * best:
    return None
  taken = timer(kernel, argument_sets)
  if not np.array_equal(np.asarray(kernel(*argument_sets[0])), y):
    raise ArithmeticError("the result is not the same at every call")
  return taken


def _compile_all(
  tasks: Sequence[Task], x: Float[Array, "M K"], weight: tuple[Array | None, ...], stop: float | None, bar: tqdm
) -> dict[tuple[Task, Config], Kernel]:
  """The candidates that compile, the first of every task first; those not begun at `stop` are left out."""
  ranks = range(max(len(task.configs) for task in tasks))
  order = [(task, task.configs[rank]) for rank in ranks for task in tasks if rank < len(task.configs)]
  arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weight)

  def compile_one(task: Task, config: Config) -> Kernel | None:
    if stop is not None and time.monotonic() > stop and config != task.configs[0]:
      return None
    kernel = functools.partial(_KERNELS[task.implementation], config=config)
    return jax.jit(kernel).lower(jax.ShapeDtypeStruct((task.problem.m, x.shape[1]), x.dtype), *arrays).compile()

  kernels, late = {}, 0
  # Threads of this pool end with the process, whatever they wait for.
  with multiprocessing.pool.ThreadPool(os.cpu_count()) as pool:
    for (task, config), result in [(one, pool.apply_async(compile_one, one)) for one in order]:
      try:
        kernel = result.get(_PATIENCE)
        late += kernel is None
        if kernel is not None:
          kernels[task, config] = kernel
      except multiprocessing.TimeoutError:
        bar.write(f"skipped: {task}, {config}: not compiled in {_PATIENCE:.0f} s", file=sys.stderr)
      except Exception as error:  # whatever a compiler raises: the candidate is none, and that is said
        bar.write(f"skipped: {task}, {config}: {(str(error) or repr(error)).splitlines()[0]}", file=sys.stderr)
      bar.update()
  if late:
    bar.write(f"left out {late} candidates for lack of time", file=sys.stderr)
  return kernels


@contextmanager
def _time_limit(what: str) -> Iterator[None]:
  """Ends the process if the block takes too long: nothing else gets it back from a kernel that never ends."""

  def give_up() -> None:
    print(f"marlin-jax: {what}: still running after {_PATIENCE:.0f} s, giving up", file=sys.stderr, flush=True)
    os._exit(1)

  timer = threading.Timer(_PATIENCE, give_up)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
