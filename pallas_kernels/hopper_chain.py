# SPDX-License-Identifier: Apache-2.0
"""The three products of a decoder layer after its attention, in one launch of the Hopper kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import hopper_grid, layout
from pallas_kernels.hopper_config import FEW_REGISTERS, ChainConfig
from pallas_kernels.hopper_operands import pad, ring, rows_of_x, scratch, weight_operands, y_smem
from pallas_kernels.hopper_program import Block, compute, copy, wait_for_cluster
from pallas_kernels.problem import MatmulProblem

Weight = tuple[Array, Array, Array | None, Array | None]  # qweight, scales, zeros, meta

_PRODUCTS = 3


def problems_of(x: Float[Array, "M K"], weights: tuple[Weight, Weight, Weight]) -> tuple[MatmulProblem, ...]:
  """The three products."""
  problems, k = [], x.shape[1]
  for i, (qweight, scales, zeros, meta) in enumerate(weights):
    groups, n = scales.shape
    kind = dict(bits=qweight.shape[2] // 8, zeros=zeros is not None, sparse24=meta is not None)
    problems.append(MatmulProblem(m=x.shape[0], n=n, k=k, group_size=k // groups, dtype=x.dtype, **kind))
    k = n // 2 if i == 1 else n
  return tuple(problems)


# A jit of its own, as `matmul_hopper` is: all layers of a model share one compilation.
@functools.partial(jax.jit, static_argnames=("epsilon", "config"))
def after_attention_hopper(
  x: Float[Array, "M K"],
  residual: Float[Array, "M E"],
  weights: tuple[Weight, Weight, Weight],
  norms: tuple[Float[Array, " E"], Float[Array, " E"]],
  *,
  epsilon: float,
  config: ChainConfig,
) -> tuple[Float[Array, "M E"], Float[Array, "M E"], Float32[Array, "T M"]]:
  """s = t + SwiGLU(norm(t) @ gate_up) @ down with t = residual + x @ output; and what is left of s's norm.

  Each product is that of `matmul_hopper`, block for block; its programs are all on the card from the beginning to the
  end, and wait in between for what the others wrote (hopper_grid.py). What that saves is the end of one launch, the
  beginning of the next and the first bytes of its weights, which are on their way while a program waits.

  Args:
    x: what attention made, bfloat16; M at most config's block_m.
    weights: (qweight, scales, zeros, meta) of the output projection, of gates and ups in turns, of down; all sizes
      multiples of 64.
    norms: scales of the norm of t and of that of s.
    epsilon: of the norm of t.

  Returns:
    s, s times the scale of its norm, and the sums of its squares, 64 columns each: see DeferredNorm.

  Raises:
    ValueError: config is not for such products.
  """
  m, dtype = x.shape[0], x.dtype
  x, residual = (pad(array, rows_of_x(m), layout.TILE) for array in (x, residual))
  rows = x.shape[0]
  problems = problems_of(x, weights)
  if reason := config.unfit_reason(problems):
    raise ValueError(reason)
  gmem = dict(x=x, residual=residual, norm_0=norms[0], norm_2=norms[1], counts=hopper_grid.counts(_PRODUCTS))
  for i, weight in enumerate(weights):
    gmem |= {f"{name}_{i}": array for name, array in weight_operands(*weight, dtype).items()}
  outputs = {}
  for i, problem in enumerate(problems):
    columns = problem.n // 2 if i == 1 else problem.n
    outputs[f"y_{i}"] = jax.ShapeDtypeStruct((rows, columns), dtype)
    if i != 1:
      outputs[f"scaled_{i}"] = jax.ShapeDtypeStruct((rows, columns), dtype)
      outputs[f"squares_{i}"] = jax.ShapeDtypeStruct((columns // layout.TILE, rows), jnp.float32)
  rings = [
    ring(c, problem, scales.dtype)
    for c, problem, (_, scales, *_) in zip(config.products, problems, weights, strict=True)
  ]
  blocks = [
    scratch(c, problem, len(stages), normalized=i == 1)
    for i, (c, problem, stages) in enumerate(zip(config.products, problems, rings, strict=True))
    for _ in range(config.turns(i, problem))
  ]
  results = plgpu.kernel(
    functools.partial(_program, names=(*gmem, *outputs), config=config, problems=problems, epsilon=epsilon),
    out_type=tuple(outputs.values()),
    scratch_types=[
      plgpu.RefUnion(*rings),
      plgpu.RefUnion(*(y_smem(c, problem) for c, problem in zip(config.products, problems, strict=True))),
      blocks,
    ],
    grid=(config.clusters,),
    grid_names=("cluster",),
    cluster=(2,),
    cluster_names=("k",),
    num_threads=config.products[0].warpgroups,
    thread_name="wg",
    kernel_name=f"w{problems[0].bits}a16_hopper_chain",
    compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
  )(*gmem.values())
  results = dict(zip(outputs, results, strict=True))
  return results["y_2"][:m], results["scaled_2"][:m], results["squares_2"][:, :m]


def _program(*refs, names, config: ChainConfig, problems, epsilon: float):
  """The blocks of all products that one program computes, in order.

  copying warpgroup       of each block: a few stages of weights; wait until what it reads is written; the rest
  computing warpgroups    compute the block, publish what it wrote; its stages are the next block's by then
  """
  gmem = dict(zip(names, refs[: len(names)], strict=True))
  rings, sums, scratches = refs[len(names) :]
  counts = gmem["counts"]
  wg, cluster, half = (lax.axis_index(name) for name in ("wg", "cluster", "k"))
  compute_warpgroups = config.products[0].compute_warpgroups

  def operands(i: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """What a product reads and what it writes."""
    weight = {name: gmem[f"{name}_{i}"] for name in ("words", "scales", "zeros", "meta") if f"{name}_{i}" in gmem}
    if i == 1:
      return weight | dict(x=gmem["scaled_0"], squares=gmem["squares_0"]), (gmem["y_1"],)
    reads = dict(x=gmem["x"], residual=gmem["residual"]) if i == 0 else dict(x=gmem["y_1"], residual=gmem["y_0"])
    return weight | reads | dict(norm=gmem[f"norm_{i}"]), tuple(
      gmem[f"{name}_{i}"] for name in ("y", "scaled", "squares")
    )

  blocks = []  # (product, block, whether this program has one)
  for i, (c, problem) in enumerate(zip(config.products, problems, strict=True)):
    reads, writes = operands(i)
    split = c.split_k == 2
    first, count = (cluster, config.clusters) if split else (2 * cluster + half, 2 * config.clusters)
    of_product = dict(config=c, problem=problem, gated=i == 1, epsilon=epsilon, gmem=reads, outputs=writes)
    for turn in range(config.turns(i, problem)):
      of_program = dict(smem=rings[i], y_smem=sums[i], scratch=scratches[len(blocks)])
      n = first + turn * count
      block = Block(**of_product, **of_program, n=n, m=0, k=half if split else 0)
      blocks.append((i, block, n < config.blocks(i, problem)))

  @pl.when(wg == compute_warpgroups)
  def _():
    plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
    for at, (i, block, mine) in enumerate(blocks):

      def wait_for_x(i=i):
        if i:
          written = config.blocks(i - 1, problems[i - 1]) * config.products[i - 1].split_k * compute_warpgroups
          hopper_grid.wait_for(counts, i - 1, written)

      @pl.when(mine)
      def _(at=at, block=block, wait_for_x=wait_for_x):
        copy(block, wait_for_x if at else None)

    hopper_grid.leave(counts, _PRODUCTS, 2 * config.clusters)

  @pl.when(wg < compute_warpgroups)
  def _():
    plgpu.set_max_registers(config.products[0].compute_registers, action="increase")
    for at, (i, block, mine) in enumerate(blocks):

      def let_go(at=at):
        """The stages are empty, for the next block."""
        if at + 1 < len(blocks):
          following = blocks[at + 1][1]
          for stage in range(following.config.num_stages):
            plgpu.barrier_arrive(following.scratch["empty"].at[stage])

      @pl.when(mine)
      def _(i=i, block=block, let_go=let_go):
        compute(block, wg, let_go)
        if i + 1 < _PRODUCTS:
          hopper_grid.publish(counts, i)
        wait_for_cluster(block, wg)

      pl.when(jnp.logical_not(mine))(let_go)
