# SPDX-License-Identifier: Apache-2.0
"""GPU kernel time that means something: CUPTI's clock, weights cold in L2, every launch counted."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hardware import H200

# Reading this much between two uses of a weight pushes it out of L2, with a factor of three to spare.
_EVICTING_BYTES = 3 * H200.l2_bytes


def copies_for_cold_l2(nbytes: int) -> int:
  """How many weights of `nbytes` bytes to rotate over so that each is cold in L2 when its turn comes."""
  return max(2, math.ceil(_EVICTING_BYTES / nbytes))


def kernel_time(compiled: Callable[..., Any], argument_sets: Sequence[tuple[Any, ...]], *, rounds: int = 5) -> float:
  """Seconds of GPU kernels per call of `compiled`, the median over calls, rotating over the argument sets.

  Everything that a call launches counts; gaps between kernels and the host's work do not.

  Args:
    compiled: a compiled function, so that nothing but its own kernels runs.
    rounds: calls with each argument set.

  Raises:
    RuntimeError: CUPTI saw no kernels, or not the same number at every call.
  """
  # What `jax.experimental.mosaic.gpu.profiler.measure` does, which however warms up and measures on the same
  # arguments: a small weight would lie in L2. Its extension module has no public name.
  from jax._src.lib import mosaic_gpu

  cupti = mosaic_gpu._mosaic_gpu_ext
  jax.block_until_ready([compiled(*arguments) for arguments in argument_sets])
  cupti._cupti_init()
  try:
    for _ in range(rounds):
      jax.block_until_ready([compiled(*arguments) for arguments in argument_sets])
  finally:
    timings = cupti._cupti_get_timings(True)
  calls = rounds * len(argument_sets)
  if not timings or len(timings) % calls:
    raise RuntimeError(f"CUPTI saw {len(timings or ())} kernels in {calls} calls, which must be a positive multiple")
  milliseconds = np.array([duration for _, duration in timings]).reshape(calls, -1).sum(axis=1)
  return float(np.median(milliseconds)) / 1e3


def measure_ceilings() -> tuple[float, float]:
  """(bytes per second of a large read, FLOP per second of a large bfloat16 product), both on random data."""
  key = jax.random.key(0)
  bits = [jax.random.bits(jax.random.fold_in(key, i), (1 << 29,), jnp.uint32) for i in range(2)]
  read = kernel_time(jax.jit(lambda x: jax.lax.reduce_or(x, (0,))).lower(bits[0]).compile(), [(x,) for x in bits])
  nbytes = bits[0].nbytes
  del bits
  x, y = (jax.random.normal(jax.random.fold_in(key, i), (8192, 8192), jnp.float32).astype(jnp.bfloat16) for i in (2, 3))
  product = kernel_time(jax.jit(jnp.dot).lower(x, y).compile(), [(x, y), (y, x)])
  return nbytes / read, 2 * 8192**3 / product
