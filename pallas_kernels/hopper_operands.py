# SPDX-License-Identifier: Apache-2.0
"""What a product of the Hopper kernel reads, and what a program has in shared memory for it."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.hopper_config import HopperConfig
from pallas_kernels.hopper_fragments import X_TRANSFORMS
from pallas_kernels.hopper_reduce import PITCH
from pallas_kernels.problem import MatmulProblem

SMEM = plgpu.SMEM


def pad(array: Array, rows: int, columns: int) -> Array:
  """With zeros, to multiples of `rows` and `columns`."""
  (r, c) = array.shape
  return jnp.pad(array, ((0, -r % rows), (0, -c % columns))) if r % rows or c % columns else array


def rows_of_x(m: int) -> int:
  """What the rows of x must be a multiple of: TMA reads it in pieces of 8 rows x 64 k."""
  return 8 if m > 8 else 1


def weight_operands(qweight: Array, scales: Array, zeros: Array | None, meta: Array | None, dtype) -> dict[str, Array]:
  """The arrays of a weight that TMA copies, which reads rows of 16 bytes; zeros are rounded to x's dtype."""
  n_tiles, k_tiles, rows, _ = qweight.shape
  operands = dict(words=qweight.reshape(n_tiles, k_tiles, rows // 32, 8, 128), scales=pad(scales, 1, 8))
  if zeros is not None:
    operands["zeros"] = pad(zeros.astype(dtype), 1, 8)
  if meta is not None:
    operands["meta"] = meta.reshape(n_tiles, k_tiles, 4, 128)
  return operands


def ring(config: HopperConfig, problem: MatmulProblem, scales_dtype) -> dict[str, Any]:
  """The stages of what is copied, by the names of the operands."""
  c, stages, runs = config, config.num_stages, config.groups_per_stage(problem)
  tiles = c.block_k // problem.tile_k
  stages_of = dict(
    x=SMEM((stages, c.block_m, c.block_k), problem.dtype, transforms=X_TRANSFORMS),
    words=SMEM((stages, c.warpgroups_n, tiles, problem.bits // 4, 8, 128), jnp.int16),
    scales=SMEM((stages, runs, c.block_n), scales_dtype),
  )
  if problem.zeros:
    stages_of["zeros"] = SMEM((stages, runs, c.block_n), problem.dtype)
  if problem.sparse24:
    stages_of["meta"] = SMEM((stages, c.warpgroups_n, tiles, 4, 128), jnp.int16)
  return stages_of


def rings(products: Sequence[dict[str, Any]]) -> dict[str, plgpu.RefUnion]:
  """The stages of products that are computed one after the other, all in the same place: a union by operand.

  A stage of a weight begins where that of every other product does, so that it may be copied while others are still
  read: it is one of [stages, times, ...], of which only the first of `times` is used. All sizes are the same but for
  powers of two, and each member of a union is one array, which begins where the union does.

  Args:
    products: `ring` of each, of weights of one kind.
  """
  unions = {}
  for name in products[0]:
    members = [stages[name] for stages in products]
    if name != "x":  # which is there when the product before is done
      most = max(map(_stage_bytes, members))
      members = [SMEM((m.shape[0], most // _stage_bytes(m), *m.shape[1:]), m.dtype) for m in members]
    unions[name] = plgpu.RefUnion(*members)
  return unions


def _stage_bytes(ref) -> int:
  return math.prod(ref.shape[1:]) * jnp.dtype(ref.dtype).itemsize


def y_smem(config: HopperConfig, problem: MatmulProblem) -> Any:
  """A slot for the sums of every warpgroup; rounded where nothing is added to them."""
  dtype = jnp.dtype(jnp.float32) if config.reduces else problem.dtype
  return SMEM((config.compute_warpgroups, config.block_m, PITCH[dtype.itemsize]), dtype)


def scratch(config: HopperConfig, problem: MatmulProblem, *, normalized: bool) -> dict[str, Any]:
  """Barriers and what else a product has for itself; hopper_program.py says who waits for whom.

  Args:
    normalized: whether a deferred norm comes before.
  """
  copies = 3 + problem.zeros + problem.sparse24  # that fill a stage, see `ring`
  c, stages, barrier = config, config.num_stages, plgpu.Barrier
  of_columns = functools.partial(barrier if c.cluster == 1 else _cluster_barrier, num_barriers=c.warpgroups_n)
  return dict(
    full=barrier(num_arrivals=copies, num_barriers=stages),
    ready=of_columns(num_arrivals=c.warpgroups_k),
    done=of_columns(num_arrivals=c.warpgroups_k),
    consumed=barrier(num_arrivals=c.compute_warpgroups),
    factored=barrier(num_arrivals=1),
    factors_smem=(SMEM((128,), jnp.float32), SMEM((c.block_m,), jnp.float32)) if normalized else (),
  )


def emptied(config: HopperConfig) -> plgpu.Barrier:
  """What a copy into a stage waits for: that all who compute have read what was in it."""
  return plgpu.Barrier(num_arrivals=config.compute_warpgroups, num_barriers=config.num_stages)


def _cluster_barrier(**arrivals: int) -> plgpu.ClusterBarrier:
  return plgpu.ClusterBarrier(collective_axes=("k",), **arrivals)
