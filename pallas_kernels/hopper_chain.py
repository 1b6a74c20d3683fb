# SPDX-License-Identifier: Apache-2.0
"""The products between the attentions of two decoder layers, in one launch of the Hopper kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import hopper_grid, layout
from pallas_kernels.hopper_config import FEW_REGISTERS, ChainConfig
from pallas_kernels.hopper_operands import emptied, pad, ring, rings, rows_of_x, scratch, weight_operands, y_smem
from pallas_kernels.hopper_program import Block, compute, copy, wait_for_cluster
from pallas_kernels.problem import MatmulProblem

Weight = tuple[Array, Array, Array | None, Array | None]  # qweight, scales, zeros, meta
Weights = tuple[Weight, Weight, Weight, Weight]  # output, gate_up, down, reader

_OUTPUT, _GATE_UP, _DOWN, _READER = range(4)
_READ_NORMED, _ADD_TO_RESIDUAL = (_GATE_UP, _READER), (_OUTPUT, _DOWN)


def problems_of(x: Float[Array, "M K"], weights: Weights) -> tuple[MatmulProblem, ...]:
  """The four products."""
  problems, k = [], x.shape[1]
  for i, (qweight, scales, zeros, meta) in enumerate(weights):
    groups, n = scales.shape
    kind = dict(bits=qweight.shape[2] // 8, zeros=zeros is not None, sparse24=meta is not None)
    problems.append(MatmulProblem(m=x.shape[0], n=n, k=k, group_size=k // groups, dtype=x.dtype, **kind))
    k = n // 2 if i == _GATE_UP else n
  return tuple(problems)


# A jit of its own, as `matmul_hopper` is: all layers of a model share one compilation.
@functools.partial(jax.jit, static_argnames=("epsilons", "config"))
def after_attention_hopper(
  x: Float[Array, "M K"],
  residual: Float[Array, "M E"],
  weights: Weights,
  norms: tuple[Float[Array, " E"], Float[Array, " E"]],
  bias: Float[Array, " N"] | None = None,
  *,
  epsilons: tuple[float, float],
  config: ChainConfig,
) -> tuple[Float[Array, "M E"], Float[Array, "M E"], Float32[Array, "T M"], Float[Array, "M N"]]:
  """s = t + SwiGLU(norm(t) @ gate_up) @ down with t = residual + x @ output; and y = norm(s) @ reader + bias.

  Each product is that of `matmul_hopper`, block for block; its programs are all on the card from the beginning to the
  end, and wait in between for what the others wrote (hopper_grid.py). What that saves is the end of one launch, the
  beginning of the next and the first bytes of its weights, which are on their way while a program waits.

  Args:
    x: what attention made, bfloat16; M at most config's block_m.
    weights: output, gates and ups in turns, down, reader; all sizes multiples of 64.
    norms: scales of the norm of t and of that of s.
    bias: of the reader.
    epsilons: of these norms.

  Returns:
    s; s times the scale of its norm and the sums of its squares, 64 columns each (DeferredNorm); y.

  Raises:
    ValueError: config is not for such products.
  """
  m, dtype = x.shape[0], x.dtype
  x, residual = (pad(array, rows_of_x(m), layout.TILE) for array in (x, residual))
  rows = x.shape[0]
  problems = problems_of(x, weights)
  if reason := config.unfit_reason(problems):
    raise ValueError(reason)
  products = tuple(zip(config.products, problems, strict=True))
  gmem = {"x": x, "residual": residual, f"norm_{_OUTPUT}": norms[0], f"norm_{_DOWN}": norms[1]}
  if bias is not None:
    gmem["bias"] = pad(bias[None], 1, config.products[_READER].block_n)[0]
  for i, weight in enumerate(weights):
    gmem |= {f"{name}_{i}": array for name, array in weight_operands(*weight, dtype).items()}
  gmem["counts"] = hopper_grid.counts(len(products) + 1)
  outputs = {}
  for i, (c, problem) in enumerate(products):
    columns = problem.n // 2 if i == _GATE_UP else problem.n
    outputs[f"y_{i}"] = jax.ShapeDtypeStruct((rows, columns), dtype)
    if i in _ADD_TO_RESIDUAL:
      outputs[f"scaled_{i}"] = jax.ShapeDtypeStruct((rows, columns), dtype)
      outputs[f"squares_{i}"] = jax.ShapeDtypeStruct((columns // layout.TILE, rows), jnp.float32)
    if c.meets_in_memory:
      gmem[f"meeting_counts_{i}"] = hopper_grid.counts(c.blocks(problem) * c.compute_warpgroups)
      outputs[f"sums_{i}"] = jax.ShapeDtypeStruct((c.split_k - 1, rows, columns), jnp.float32)
  stages = rings([ring(*product, scales.dtype) for product, (_, scales, *_) in zip(products, weights, strict=True)])
  of_products = [scratch(*product, normalized=i in _READ_NORMED) for i, product in enumerate(products)]
  results = plgpu.kernel(
    functools.partial(_program, names=(*gmem, *outputs), config=config, problems=problems, epsilons=epsilons),
    out_type=tuple(outputs.values()),
    scratch_types=[
      stages,
      plgpu.RefUnion(*(y_smem(*product) for product in products)),
      of_products,
      emptied(config.products[0]),
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
  y = dict(zip(outputs, results, strict=True))
  return y[f"y_{_DOWN}"][:m], y[f"scaled_{_DOWN}"][:m], y[f"squares_{_DOWN}"][:, :m], y[f"y_{_READER}"][:m]


def _program(*refs, names, config: ChainConfig, problems, epsilons: tuple[float, float]):
  """The blocks that one program computes, of each product one, none or several, in order.

  copying warpgroup       of each block: a few stages of weights, as those of the block before are read; wait until what
                            it reads is written; the rest
  computing warpgroups    compute the block, publish what it wrote
  """
  gmem = dict(zip(names, refs[: len(names)], strict=True))
  stages, sums, scratches, empty = refs[len(names) :]
  counts = gmem["counts"]
  wg, cluster, half = (lax.axis_index(name) for name in ("wg", "cluster", "k"))
  program, compute_warpgroups = 2 * cluster + half, config.products[0].compute_warpgroups

  def operands(i: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """What a product reads and what it writes."""
    of_product = "words", "scales", "zeros", "meta", "sums", "meeting_counts"
    reads = {name: gmem[f"{name}_{i}"] for name in of_product if f"{name}_{i}" in gmem}
    if i in _READ_NORMED:
      reads |= dict(x=gmem[f"scaled_{i - 1}"], squares=gmem[f"squares_{i - 1}"])
      return reads | ({"bias": gmem["bias"]} if i == _READER and "bias" in gmem else {}), (gmem[f"y_{i}"],)
    x, residual = ("x", "residual") if i == _OUTPUT else (f"y_{_GATE_UP}", f"y_{_OUTPUT}")
    reads |= dict(x=gmem[x], residual=gmem[residual], norm=gmem[f"norm_{i}"])
    return reads, tuple(gmem[f"{name}_{i}"] for name in ("y", "scaled", "squares"))

  blocks = []  # the first of this program, and all that there are
  for i, (c, problem) in enumerate(zip(config.products, problems, strict=True)):
    reads, writes = operands(i)
    n, k = (program, 0) if c.split_k == 1 else (lax.div(program, c.split_k), lax.rem(program, c.split_k))
    of_product = dict(config=c, problem=problem, gated=i == _GATE_UP, gmem=reads, outputs=writes)
    smem = {name: members[i] if name == "x" else members[i].at[:, 0] for name, members in stages.items()}
    of_program = dict(smem=smem, y_smem=sums[i], scratch=scratches[i] | dict(empty=empty), n=n, m=0, k=k)
    block = Block(**of_product, **of_program, epsilon=epsilons[0 if i == _GATE_UP else 1])
    blocks.append((block, config.blocks(i, problem)))

  def each(i: int, do: Callable[[Block], None]):
    """Of those of product i that this program has."""
    block, count = blocks[i]
    programs = 2 * config.clusters // block.config.split_k
    if count <= programs:
      pl.when(block.n < count)(lambda: do(block))
    else:
      turns = lax.div(count - block.n + programs - 1, programs)
      pl.loop(0, turns)(lambda turn: do(dataclasses.replace(block, n=block.n + turn * programs)))

  @pl.when(wg == compute_warpgroups)
  def _():
    plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
    for i in range(len(blocks)):

      def wait_for_x(i=i):
        programs = config.blocks(i - 1, problems[i - 1]) * config.products[i - 1].split_k
        hopper_grid.wait_for(counts, i - 1, programs * compute_warpgroups)

      unused = 0 if i else config.products[0].num_stages
      each(i, functools.partial(copy, unused=unused, wait_for_x=wait_for_x if i else None))

    hopper_grid.leave(counts, len(blocks), 2 * config.clusters)

  @pl.when(wg < compute_warpgroups)
  def _():
    plgpu.set_max_registers(config.products[0].compute_registers, action="increase")
    for i in range(len(blocks)):

      def compute_and_publish(block, i=i):
        compute(block, wg)
        if i + 1 < len(blocks):
          hopper_grid.publish(counts, i)
        wait_for_cluster(block, wg)

      each(i, compute_and_publish)
      if i == 0:  # what follows waits for every stage to be read, those that nothing was copied to as well
        block, count = blocks[0]

        @pl.loop(jnp.where(block.n < count, block.run_of_steps()[1], 0), block.config.num_stages)
        def _(stage):
          plgpu.barrier_arrive(empty.at[stage])
