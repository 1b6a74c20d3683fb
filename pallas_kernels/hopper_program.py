# SPDX-License-Identifier: Apache-2.0
"""What the warpgroups of a program of the Hopper kernel do for a block of y, and how they hand stages to each other.

y[m, n] = sum over k of x[m, k] * s[k // group, n] * (code[k, n] - zero[k // group, n]) + bias[n] + residual[m, n]

A block is block_n columns x block_m rows x one of split_k runs of K, which is block_k steps in a ring of stages.

    copying warpgroup       wait for `empty`, start TMA copies (words, x, scales, zeros) that arrive on `full`; then,
                              with a deferred norm, what its rows are divided by (hopper_norm.py), arrive on `factored`
    computing warpgroup     wgmma of tile t on 64 columns . x^T   (asynchronous)
      (n, j): column tile n   decode tile t + 1: 16 bytes a thread, shift, mask, fma -> registers of fragment A
      and the j-th part of  wait for tile t; after the last tile of a group, sum += partial * scale
      every stage's k
    the same, at the end    sums to shared memory, barrier over all that share the columns, each adds its share of the
                              rows in the order of K and writes it; runs that are no cluster leave it to run 0, in
                              device memory (hopper_reduce.py)

A program with several blocks takes them in turn: the copying warpgroup is at the next one while the last tiles of one
are computed and written, and waits for nothing but empty stages.

With a deferred norm x stands for x / rms, and with a norm to come y * norm and y's squares are written as well.

With 2:4 sparse weights a tile of 64 columns has 128 k and 64 kept codes of each column, and the words of their
positions go the way of those of the codes, to the tensor cores.

Out of range, TMA reads zeros: x and scales are zero there, whatever the codes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import layout
from pallas_kernels.dequant import DECODED
from pallas_kernels.hopper_config import FEW_REGISTERS, HopperConfig
from pallas_kernels.hopper_fragments import (
  DECODED_SCALED,
  POSITIONS,
  X_TRANSFORMS,
  Columns,
  decode_tile,
  mma_issue,
  mma_wait,
  of_columns,
  ring_of,
)
from pallas_kernels.hopper_norm import write_factors
from pallas_kernels.hopper_reduce import Meeting, store_partial, write_rows
from pallas_kernels.hopper_share import Share, load_addends
from pallas_kernels.problem import MatmulProblem

# Stages of weights that are asked for before x is there. With more of them on their way what is published in the
# meantime takes longer, and so does a layer: 37.9 us with three, 39.1 with four (docs/kernel.md).
_AHEAD = 3
# Rows of blocks that take turns: 2326 us at M=4096 of 8192 x 28672, and 2367 where all 32 do.
_BAND = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """A block of y, as one of the programs that compute it sees it.

  Attributes:
    config, problem, gated, epsilon: of the product; epsilon is that of the norm before it.
    gmem: the operands that there are, in device memory, by name.
    outputs: y; with a norm to come also y * norm and the squares of y.
    smem: the stages of what is copied, by the names of the operands.
    y_smem: a slot for the sums of every warpgroup.
    scratch: shared memory and barriers that are of one product alone, see `hopper_operands.scratch`.
    n, m, k: which block_n columns, which block_m rows, which run of K.
  """

  config: HopperConfig
  problem: MatmulProblem
  gated: bool
  epsilon: float
  gmem: dict[str, Any]
  outputs: tuple[Any, ...]
  smem: dict[str, Any]
  y_smem: Any
  scratch: dict[str, Any]
  n: Any
  m: Any
  k: Any

  def run_of_steps(self):
    """(first, count) of the steps of its run of K; count is an int where all runs are as long."""
    k_tiles = self.gmem["words"].shape[1]
    total = -(-k_tiles // (self.config.block_k // self.problem.tile_k))
    return run_of_steps(self.k, total, self.config.split_k)

  def column_tile_and_part(self, wg):
    """Which tile of its columns, and which part of every stage's k, a computing warpgroup has."""
    parts = self.config.warpgroups_k
    return (wg, 0) if parts == 1 else (lax.div(wg, parts), lax.rem(wg, parts))


def run_of_steps(run, total: int, runs: int):
  """(first, count) of the steps of one run of K; none is without, a program would wait for ever."""
  if total % runs == 0:
    return run * (total // runs), total // runs
  first, end = (lax.div((run + i) * total, runs) for i in (0, 1))
  return first, end - first


def copy(block: Block, unused, wait_for_x: Callable[[], None] | None = None):
  """The copying warpgroup: all stages of the block and, with a deferred norm, the factors of its rows.

  Args:
    unused: the first so many stages have not been copied to yet, an int or an int32 scalar; all others are those of the
      block before until they are `empty`.
    wait_for_x: returns when x, squares and residual may be read, for which weights need not wait. None: they may be.
  """
  b, c, scratch = block, block.config, block.scratch
  problem, stages, tiles = b.problem, c.num_stages, c.block_k // b.problem.tile_k
  group_size, runs = c.group_size(problem), c.groups_per_stage(problem)
  first_step, steps = b.run_of_steps()

  def start(t, *names):
    stage, step = lax.rem(t, stages), first_step + t
    columns = pl.ds(b.n * c.block_n, c.block_n)
    words = pl.ds(b.n * c.warpgroups_n, c.warpgroups_n), pl.ds(step * tiles, tiles)
    groups = pl.ds(0 if problem.group_size == problem.k else step * c.block_k // group_size, runs), columns
    rows = pl.ds(b.m * c.block_m, c.block_m), pl.ds(step * c.block_k, c.block_k)
    indices = dict(words=words, meta=words, x=rows, scales=groups, zeros=groups)
    for name in names:
      if name in b.smem:
        source, target = b.gmem[name].at[indices[name]], b.smem[name].at[stage]
        plgpu.copy_gmem_to_smem(source, target, scratch["full"].at[stage])

  def wait_until_empty(t):
    def wait():
      plgpu.barrier_wait(scratch["empty"].at[lax.rem(t, stages)])

    wait() if isinstance(unused, int) and unused == 0 else pl.when(t >= unused)(wait)

  weights, begun = ("words", "scales", "meta", "zeros"), 0
  if wait_for_x is not None:
    begun = jnp.minimum(steps, min(_AHEAD, stages))

    @pl.loop(0, begun)
    def _(t):
      wait_until_empty(t)
      start(t, *weights)

    wait_for_x()

    @pl.loop(0, begun)
    def _(t):
      start(t, "x")

  @pl.loop(begun, steps)
  def _(t):
    wait_until_empty(t)
    start(t, *weights, "x")  # what comes from furthest away first

  if "squares" in b.gmem:
    partial_smem, factors_smem = scratch["factors_smem"]
    rows = dict(first_row=b.m * c.block_m, features=problem.k, epsilon=b.epsilon)
    write_factors(b.gmem["squares"], partial_smem, factors_smem, **rows)
    plgpu.barrier_arrive(scratch["factored"])


def compute(block: Block, wg):
  """A computing warpgroup (wg, an int32 scalar): its part of the block's sums, its share of what is written of them."""
  b, c, problem, scratch = block, block.config, block.problem, block.scratch
  gmem, smem, dtype, tile_k = b.gmem, b.smem, problem.dtype, problem.tile_k
  stages, tiles = c.num_stages, c.block_k // tile_k
  tiles_each = tiles // c.warpgroups_k
  group_size, runs = c.group_size(problem), c.groups_per_stage(problem)
  _, steps = b.run_of_steps()
  column_tile, part = b.column_tile_and_part(wg)
  first_tile = part * tiles_each  # of those of a stage, this warpgroup's
  first_column = b.n * c.block_n + column_tile * layout.TILE
  part_of_k = b.k * c.warpgroups_k + part  # of what all programs of the block sum
  sums_shape = (layout.TILE, c.block_m)
  # Where this warpgroup's part of each stage begins, in bytes.
  planes, part_k = problem.bits // 4, tiles_each * tile_k
  tile_bytes = 2 * layout.TILE_WORDS * planes
  own = dict(words=(column_tile * tiles + first_tile) * tile_bytes, x=first_tile * tile_k * 8 * 2)
  if part_k >= group_size:  # one divides the other, where a stage has several groups: both are powers of two
    first_group = part * (part_k // group_size)
  else:
    first_group = lax.div(part, group_size // part_k) if runs > 1 else 0
  first_scale = first_group * c.block_n + column_tile * layout.TILE
  own |= {name: first_scale * smem[name].dtype.itemsize for name in ("scales", "zeros") if name in smem}
  ring = {name: ring_of(smem[name], place, X_TRANSFORMS if name == "x" else ()) for name, place in own.items()}
  # Decoding subtracts zero points, in bfloat16, or multiplies by scales, where a scale times the zero point is exact.
  zeros_fused = problem.zeros and problem.bits == 4 and dtype == jnp.bfloat16
  scales_fused = c.scale_weights and not problem.zeros and problem.bits == 4 and dtype == jnp.bfloat16

  def fragment(stage, tile):
    """The weights of a tile in registers, and the positions of 2:4 sparse ones."""
    if problem.sparse24:
      positions = plgpu.load(smem["meta"].at[stage, column_tile, first_tile + tile], layout=POSITIONS)
      return weights(stage, tile), positions
    return weights(stage, tile), None

  def weights(stage, tile):
    with jax.named_scope("dequantize"):
      words = ring["words"].address(stage, tile * tile_bytes)
      zero = 0 if problem.zeros else 2 ** (problem.bits - 1)
      zeros = group_of("zeros", stage, tile * tile_k) if problem.zeros else None
      scales = group_of("scales", stage, tile * tile_k) if c.scale_weights else None
      fused = dict(zeros=zeros if zeros_fused else None, scales=scales if scales_fused else None)
      w = decode_tile(words, dtype, planes=planes, zero=zero, **fused)
      if zeros is not None and not zeros_fused:
        w -= of_columns(zeros, w.shape) * dtype.type(DECODED[dtype])
      return w if scales is None or scales_fused else w * of_columns(scales, w.shape).astype(dtype)

  def group_of(name, stage, k):
    """The scales or zeros of the group that `k` of this warpgroup's part is in, one a column."""
    dtype = smem[name].dtype
    return Columns(ring[name].address(stage, k // group_size * c.block_n * dtype.itemsize), dtype)

  def beginning():
    """What the sums are added to: 0, and in the first part of K the bias."""
    if "bias" not in gmem:
      return plgpu.layout_cast(jnp.zeros(sums_shape, jnp.float32), plgpu.Layout.WGMMA)

    def load():
      values = gmem["bias"].at[pl.ds(first_column, layout.TILE)]
      return plgpu.load(values, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False).astype(jnp.float32)

    def nothing():
      return plgpu.layout_cast(jnp.zeros(layout.TILE, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

    return lax.broadcast_in_dim(lax.cond(part_of_k == 0, load, nothing) if c.reduces else load(), sums_shape, [0])

  def multiply(stage, acc, w, following):
    """acc + the step's product; `w` is the fragment of its first tile, the result has that of `following`."""
    partial = acc if c.scale_weights else None
    for tile in range(tiles_each):
      x = ring["x"].address(stage, tile * tile_k * 8 * 2)
      w, positions = w
      operands = dict(block_m=c.block_m, block_k=c.block_k, positions=positions)
      if group_size < tile_k:
        steps_of_half = ((0, 2), (2, 4))
        started = [mma_issue(w, x, None, k_steps=steps, **operands) for steps in steps_of_half]
      else:
        started = [mma_issue(w, x, partial, **operands)]

      def decode_next(tile=tile):
        return fragment(stage, tile + 1) if tile + 1 < tiles_each else following()

      if c.decode_ahead:
        w = decode_next()
      end = (tile + 1) * tile_k
      group_ends = len(started) == 2 or end % min(group_size, c.block_k) == 0 or tile + 1 == tiles_each
      # What sums are scaled with is loaded before the wait for wgmma, which hides it.
      if group_ends and not c.scale_weights:
        ks = [tile * tile_k + tile_k // 2 * half for half in range(len(started))]
        of_halves = [of_columns(group_of("scales", stage, k), sums_shape) for k in ks]
      done_tiles = mma_wait(*started)
      if not c.decode_ahead:
        w = decode_next()
      if c.scale_weights:
        acc = partial = done_tiles[0]
      elif group_ends:
        for sums, scales in zip(done_tiles, of_halves, strict=True):
          acc += sums * scales.astype(jnp.float32)
        partial = None
      else:
        partial = done_tiles[0]
    return acc, w

  def step(t, carry, stage):
    acc, w = carry
    next_stage = (stage + 1) % stages if isinstance(stage, int) else lax.rem(t + 1, stages)

    def following():
      @pl.when(t + 1 < steps)  # or else what is read is of no use
      def _():
        plgpu.barrier_wait(scratch["full"].at[next_stage])

      return fragment(next_stage, 0)

    carry = multiply(stage, acc, w, following)
    plgpu.barrier_arrive(scratch["empty"].at[stage])
    return carry

  def turn(i, carry):
    for stage in range(stages):
      carry = step(i * stages + stage, carry, stage)
    return carry

  zero = plgpu.layout_cast(jnp.zeros(sums_shape, jnp.float32), plgpu.Layout.WGMMA)
  plgpu.barrier_wait(scratch["full"].at[0])
  written = Share(
    block_m=c.block_m,
    slots=c.warpgroups_k,
    programs=c.cluster,
    tile=column_tile,
    number=part_of_k if c.cluster > 1 else part,
    first_row=b.m * c.block_m,
    first_column=first_column // 2 if b.gated else first_column,
    gated=b.gated,
  )
  addends = load_addends(b.outputs, gmem.get("residual"), gmem.get("norm"), written)
  carry, turns = (zero, fragment(0, 0)), 0
  if c.unroll:
    turns = steps // stages if isinstance(steps, int) else lax.div(steps, stages)
    carry = lax.fori_loop(0, turns, turn, carry)
  if not (isinstance(steps, int) and turns * stages == steps):  # which halves the code
    carry = lax.fori_loop(turns * stages, steps, lambda t, carry: step(t, carry, lax.rem(t, stages)), carry)
  acc, _ = carry

  acc *= 1 / (DECODED_SCALED if scales_fused else DECODED[dtype])
  if "squares" in gmem:
    plgpu.barrier_wait(scratch["factored"])
    by = plgpu.load(scratch["factors_smem"][1], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    acc *= lax.broadcast_in_dim(by, acc.shape, [1])
  acc += beginning()

  with jax.named_scope("reduce"):
    if c.y_in_ring:  # y_smem is where the ring was
      plgpu.barrier_arrive(scratch["consumed"])
      plgpu.barrier_wait(scratch["consumed"])
    store_partial(acc, b.y_smem.at[wg], across_programs=c.cluster > 1, gated=b.gated and not c.reduces)
    if c.reduces:
      plgpu.barrier_arrive(scratch["ready"].at[column_tile])
      plgpu.barrier_wait(scratch["ready"].at[column_tile])
    meeting = Meeting(gmem["sums"], gmem["meeting_counts"], b.k) if c.meets_in_memory else None
    write_rows(b.y_smem, b.outputs, addends, meeting, written)


def wait_for_cluster(block: Block, wg):
  """A computing warpgroup that has written: until the others have read its sums, which must outlive that."""
  if block.config.cluster > 1:
    done = block.scratch["done"].at[block.column_tile_and_part(wg)[0]]
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)


def _place(index, columns: int, rows: int):
  """(n, m) of a block: bands of eight rows of blocks, whose x stays in the cache while all columns pass once."""
  if rows == 1:
    return index, 0
  band, within = lax.div(index, _BAND * columns), lax.rem(index, _BAND * columns)
  height = _BAND if rows % _BAND == 0 else jnp.minimum(_BAND, rows - _BAND * band)
  return lax.div(within, height), _BAND * band + lax.rem(within, height)


def program(*refs, names, config: HopperConfig, problem: MatmulProblem, gated: bool, epsilon: float):
  """One block of one product, or every so manieth; see above."""
  gmem = dict(zip(names, refs[: len(names)], strict=True))
  *outputs, (smem, y_smem), scratch = refs[len(names) :]
  wg, first = lax.axis_index("wg"), lax.axis_index("block")
  k = lax.axis_index("k") if config.split_k > 1 else 0
  of_product = dict(config=config, problem=problem, gated=gated, epsilon=epsilon)
  of_program = dict(gmem=gmem, outputs=tuple(outputs), smem=smem, y_smem=y_smem, scratch=scratch)
  columns, count = -(-gmem["words"].shape[0] // config.warpgroups_n), config.blocks(problem)

  def each(do: Callable[[Block, Any], None]):
    """Calls it with every block of this program and with its number among them."""

    def turn(t):
      index = first + t * config.programs
      n, m = _place(index, columns, count // columns)
      do(Block(**of_product, **of_program, n=n, m=m, k=k), t)

    if config.programs:
      pl.loop(0, lax.div(count - first + config.programs - 1, config.programs))(turn)
    else:
      turn(0)

  @pl.when(wg == config.compute_warpgroups)
  def _():
    plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
    stages = config.num_stages
    each(lambda block, t: copy(block, stages if isinstance(t, int) else jnp.where(t == 0, stages, 0)))

  @pl.when(wg < config.compute_warpgroups)
  def _():
    plgpu.set_max_registers(config.compute_registers, action="increase")

    def compute_block(block, _):
      compute(block, wg)
      wait_for_cluster(block, wg)

    each(compute_block)
