# SPDX-License-Identifier: Apache-2.0
"""Where the GPU time of a program goes: CUPTI's kernel times, summed by the kind of kernel."""

import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class KernelClass(NamedTuple):
  """All kernels of one kind. `seconds` and `count` are per step."""

  name: str
  seconds: float
  count: float


class Profile(NamedTuple):
  """Kernels by falling time, and the wall time of a step, which is theirs and the gaps between them."""

  kernels: list[KernelClass]
  wall: float

  @property
  def busy(self) -> float:
    """Seconds of kernels in a step."""
    return sum(kernel.seconds for kernel in self.kernels)

  def __str__(self) -> str:
    lines = ["      us  kernels  share  kernel"]
    for name, seconds, count in self.kernels:
      lines.append(f"{seconds * 1e6:>8.1f} {count:>8.1f}  {seconds / self.wall:>5.1%}  {name}")
    count = sum(kernel.count for kernel in self.kernels)
    gaps = self.wall - self.busy
    lines.append(f"{gaps * 1e6:>8.1f} {'':>8}  {gaps / self.wall:>5.1%}  (no kernel running)")
    lines.append(f"{self.wall * 1e6:>8.1f} {count:>8.1f}         a step")
    return "\n".join(lines)


def profile(run: Callable[[], Any], steps: int) -> Profile:
  """What `run()` spends its time on, per step; it is called twice, once to warm up and for the wall time.

  Args:
    run: launches `steps` steps; its result is waited for.

  Raises:
    RuntimeError: CUPTI saw no kernel.
  """
  # See timing.kernel_time for why this module.
  from jax._src.lib import mosaic_gpu

  cupti = mosaic_gpu._mosaic_gpu_ext
  began = time.perf_counter()
  jax.block_until_ready(run())
  wall = time.perf_counter() - began
  cupti._cupti_init()
  try:
    jax.block_until_ready(run())
  finally:
    timings = cupti._cupti_get_timings(True)
  if not timings:
    raise RuntimeError("CUPTI saw no kernels")
  return summarize(timings, wall, steps)


def summarize(timings: list[tuple[str, float]], wall: float, steps: int) -> Profile:
  """(kernel name, milliseconds) pairs of `steps` steps, which took `wall` seconds, as a Profile of one step."""
  milliseconds, counts = Counter(), Counter()
  for name, duration in timings:
    kind = kernel_class(name)
    milliseconds[kind] += duration
    counts[kind] += 1
  kernels = [KernelClass(kind, ms / 1e3 / steps, counts[kind] / steps) for kind, ms in milliseconds.most_common()]
  return Profile(kernels, wall / steps)


def kernel_class(name: str) -> str:
  """A kernel's name without what only numbers it: XLA calls the tenth fusion of a kind `loop_fusion_9`."""
  name = re.sub(r"<.*|\(.*", "", name).removeprefix("void ")
  return re.sub(r"(_\d+)+$", "", name)[:60]
