# SPDX-License-Identifier: Apache-2.0
"""One program of the Hopper kernel: the roles of its warpgroups, and how they hand stages to each other."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import layout
from pallas_kernels.hopper_config import FEW_REGISTERS
from pallas_kernels.hopper_fragments import POSITIONS, RAISED, WORDS, decode_tile, mma_issue, mma_wait
from pallas_kernels.hopper_norm import write_factors
from pallas_kernels.hopper_reduce import store_partial, write_rows
from pallas_kernels.hopper_row_sums import negative_row_sums


def program(*refs, names, config, problem, gated, k_tiles, epsilon):
  """y[m, n] = sum over k of x[m, k] * s[k // group, n] * (code[k, n] - zero[k // group, n]) + bias[n] + residual[m, n].

  One program: block_n columns x block_m rows x one of split_k runs of K, a run of block_k steps in a ring of stages.

    copying warpgroup       wait for `empty`, start TMA copies (words, x, scales, zeros) that arrive on `full`; then,
                              with a deferred norm, what its rows are divided by (hopper_norm.py), arrive on `factored`
    adding warpgroup        with sum_zeros: wait for `full`, add up the stage's x, arrive on `summed`
    computing warpgroup     wgmma of tile t on 64 columns . x^T   (asynchronous)
      (n, j): column tile n   decode tile t + 1: 16 bytes a thread, shift, lop3, subtract -> registers of fragment A
      and the j-th part of  wait for tile t; after the last tile of a group, sum += partial * scale
      every stage's k
    the same, at the end    sums to shared memory, barrier over all that share the columns, each adds its share of the
                              rows in the order of K and writes it (hopper_reduce.py)

  With a deferred norm x stands for x / rms, and with a norm to come y * norm and y's squares are written as well.

  With 2:4 sparse weights a tile of 64 columns has 128 k and 64 kept codes of each column, and the words of their
  positions go the way of those of the codes, to the tensor cores.

  Out of range, TMA reads zeros: x and scales are zero there, whatever the codes.
  """
  gmem = dict(zip(names, refs[: len(names)], strict=True))  # the operands that there are
  *outputs, ring, full, empty, ready, done, consumed, sums_smem, summed, factors, factored = refs[len(names) :]
  smem, y_smem = ring  # the stages of what is copied, by the names of the operands
  c, tile_k = config, problem.tile_k
  stages, tiles = c.num_stages, c.block_k // tile_k
  tiles_each = tiles // c.warpgroups_k
  wg, nb, mb = (lax.axis_index(name) for name in ("wg", "n", "m"))
  sk = lax.axis_index("k") if c.split_k > 1 else 0
  first_step, steps = _run_of_steps(sk, -(-k_tiles // tiles), c.split_k)
  group_size = c.group_size(problem)
  runs = c.groups_per_stage(problem)
  segment = c.segment(problem)
  dtype = problem.dtype

  @pl.when(wg == c.compute_warpgroups)
  def copy():
    plgpu.set_max_registers(FEW_REGISTERS, action="decrease")

    @pl.loop(0, steps)
    def _(t):
      stage, step = lax.rem(t, stages), first_step + t

      @pl.when(t >= stages)
      def _():
        plgpu.barrier_wait(empty.at[stage])

      def copy(name, *index):
        if name in smem:
          plgpu.copy_gmem_to_smem(gmem[name].at[index], smem[name].at[stage], full.at[stage])

      columns = pl.ds(nb * c.block_n, c.block_n)
      words = pl.ds(nb * c.warpgroups_n, c.warpgroups_n), pl.ds(step * tiles, tiles)
      groups = pl.ds(0 if problem.group_size == problem.k else step * c.block_k // group_size, runs)
      copy("words", *words)
      copy("meta", *words)
      copy("x", pl.ds(mb * c.block_m, c.block_m), pl.ds(step * c.block_k, c.block_k))
      copy("scales", groups, columns)
      copy("zeros", groups, columns)

    if "squares" in gmem:
      partial_smem, factors_smem = factors
      rows = dict(first_row=mb * c.block_m, features=problem.k, epsilon=epsilon)
      write_factors(gmem["squares"], partial_smem, factors_smem, **rows)
      plgpu.barrier_arrive(factored)

  if c.sum_zeros:

    @pl.when(wg == c.compute_warpgroups + 1)
    def add_up_x():
      plgpu.set_max_registers(FEW_REGISTERS, action="decrease")

      @pl.loop(0, steps)
      def _(t):
        stage = lax.rem(t, stages)
        plgpu.barrier_wait(full.at[stage])
        negative_row_sums(smem["x"], sums_smem, stage)
        plgpu.barrier_arrive(summed.at[stage])

  @pl.when(wg < c.compute_warpgroups)
  def compute():
    plgpu.set_max_registers(c.compute_registers, action="increase")
    column_tile, part = (wg, 0) if c.warpgroups_k == 1 else (lax.div(wg, c.warpgroups_k), lax.rem(wg, c.warpgroups_k))
    first_tile = part * tiles_each  # of those of a stage, this warpgroup's
    first_column = nb * c.block_n + column_tile * layout.TILE
    share = sk * c.warpgroups_k + part  # of what is summed over K, and of the rows to write

    def fragment(stage, tile):
      """The weights of a tile in registers, and the positions of 2:4 sparse ones."""
      if problem.sparse24:
        positions = plgpu.load(smem["meta"].at[stage, column_tile, first_tile + tile], layout=POSITIONS)
        return weights(stage, tile), positions
      return weights(stage, tile), None

    def weights(stage, tile):
      with jax.named_scope("dequantize"):
        planes = [
          plgpu.load(smem["words"].at[stage, column_tile, first_tile + tile, plane], layout=WORDS)
          for plane in range(problem.bits // 4)
        ]
        zero = None if c.sum_zeros else 0 if problem.zeros else 2 ** (problem.bits - 1)
        w = decode_tile(planes, dtype, zero=zero)
        if problem.zeros and not c.sum_zeros:
          w -= columns(of_group("zeros", stage, tile * tile_k), w.shape)
        return w * columns(of_group("scales", stage, tile * tile_k), w.shape).astype(dtype) if c.scale_weights else w

    def index(k, length):
      """Which of a stage's runs of `length` the `k` of this warpgroup's part is in."""
      k += first_tile * tile_k
      return k // length if c.warpgroups_k == 1 else lax.div(k, length)

    def of_group(name, stage, k):
      """The scales or zeros of the group that `k` of this warpgroup's part is in, one a column."""
      return plgpu.load(
        smem[name].at[stage, 0 if runs == 1 else index(k, group_size), pl.ds(column_tile * layout.TILE, layout.TILE)],
        layout=plgpu.Layout.WGMMA.reduce(1),
        optimized=False,
      )

    def columns(values, shape):
      """One value a column, over all of `shape`."""
      return lax.broadcast_in_dim(values, shape, [0])

    def beginning():
      """What the sums are added to: 0, and in the first share the bias."""
      shape = (layout.TILE, c.block_m)
      if "bias" not in gmem:
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

      def load():
        values = gmem["bias"].at[pl.ds(first_column, layout.TILE)]
        return plgpu.load(values, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False).astype(jnp.float32)

      def nothing():
        return plgpu.layout_cast(jnp.zeros(layout.TILE, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

      return columns(lax.cond(share == 0, load, nothing) if c.reduces else load(), shape)

    def multiply(stage, acc, w, following):
      """acc + the step's product; `w` is the fragment of its first tile, the result has that of `following`."""
      partial, summed_waited = acc if c.scale_weights else None, False
      for tile in range(tiles_each):
        x = smem["x"].at[stage, :, pl.ds((first_tile + tile) * tile_k, tile_k)]
        w, positions = w
        if group_size < tile_k:
          steps_of_half = ((0, 2), (2, 4))
          started = [mma_issue(w, x, None, positions=positions, k_steps=steps) for steps in steps_of_half]
        else:
          started = [mma_issue(w, x, partial, positions=positions)]

        def decode_next(tile=tile):
          return fragment(stage, tile + 1) if tile + 1 < tiles_each else following()

        if c.decode_ahead:
          w = decode_next()
        end = (tile + 1) * tile_k
        group_ends = len(started) == 2 or end % min(group_size, c.block_k) == 0 or tile + 1 == tiles_each
        # What sums are scaled with is loaded before the wait for wgmma, which hides it.
        if group_ends and not c.scale_weights:
          of_halves = [of_group("scales", stage, tile * tile_k + tile_k // 2 * half) for half in range(len(started))]
        if c.sum_zeros and group_ends:
          zeros = of_group("zeros", stage, tile * tile_k)
          if not summed_waited:
            plgpu.barrier_wait(summed.at[stage])
            summed_waited = True
          x_sums = plgpu.load(
            sums_smem.at[stage, index(tile * tile_k, segment)],
            layout=plgpu.Layout.WGMMA.reduce(0),
            optimized=False,
          )
        done_tiles = mma_wait(*started)
        if not c.decode_ahead:
          w = decode_next()
        if c.scale_weights:
          acc = partial = done_tiles[0]
        elif group_ends:
          for sums, scales in zip(done_tiles, of_halves, strict=True):
            if c.sum_zeros:
              raised = columns(zeros.astype(jnp.float32) + RAISED[dtype], sums.shape)
              sums += lax.broadcast_in_dim(x_sums, sums.shape, [1]) * raised
            acc += sums * columns(scales.astype(jnp.float32), sums.shape)
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
          plgpu.barrier_wait(full.at[next_stage])

        return fragment(next_stage, 0)

      carry = multiply(stage, acc, w, following)
      plgpu.barrier_arrive(empty.at[stage])
      return carry

    def turn(i, carry):
      for stage in range(stages):
        carry = step(i * stages + stage, carry, stage)
      return carry

    zero = plgpu.layout_cast(jnp.zeros((layout.TILE, c.block_m), jnp.float32), plgpu.Layout.WGMMA)
    begin = zero if "squares" in gmem else beginning()
    plgpu.barrier_wait(full.at[0])
    carry, turns = (begin, fragment(0, 0)), 0
    if c.unroll:
      turns = lax.div(steps, stages)
      carry = lax.fori_loop(0, turns, turn, carry)
    acc, _ = lax.fori_loop(turns * stages, steps, lambda t, carry: step(t, carry, lax.rem(t, stages)), carry)

    if "squares" in gmem:
      plgpu.barrier_wait(factored)
      by = plgpu.load(factors[1], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
      acc = acc * lax.broadcast_in_dim(by, acc.shape, [1]) + beginning()

    with jax.named_scope("reduce"):
      if c.y_in_ring:  # y_smem is where the ring was
        plgpu.barrier_arrive(consumed)
        plgpu.barrier_wait(consumed)
      store_partial(acc, y_smem.at[wg], across_programs=c.split_k > 1, gated=gated and not c.reduces)
      if c.reduces:
        plgpu.barrier_arrive(ready.at[column_tile])
        plgpu.barrier_wait(ready.at[column_tile])
      write_rows(
        y_smem,
        outputs,
        gmem.get("residual"),
        gmem.get("norm"),
        slot=column_tile * c.warpgroups_k,
        share=share,
        first_row=mb * c.block_m,
        first_column=first_column // 2 if gated else first_column,
        slots=c.warpgroups_k,
        programs=c.split_k,
        gated=gated,
      )
      if c.split_k > 1:  # its shared memory must outlive the reads of the others
        plgpu.barrier_arrive(done.at[column_tile])
        plgpu.barrier_wait(done.at[column_tile])


def _run_of_steps(program, total: int, programs: int):
  """(first, count) of the steps of one of the programs that share them; none is without, it would wait for ever."""
  first, end = (lax.div((program + i) * total, programs) for i in (0, 1))
  return first, end - first
