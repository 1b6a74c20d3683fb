# SPDX-License-Identifier: Apache-2.0
"""The Mosaic GPU kernel for Hopper: weights as the register operand of wgmma, the batch as its narrow side."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int16

from pallas_kernels import layout
from pallas_kernels.hardware import Device
from pallas_kernels.hopper_config import FEW_REGISTERS, HopperConfig
from pallas_kernels.hopper_fragments import POSITIONS, RAISED, WORDS, X_TRANSFORMS, decode_tile, mma_issue, mma_wait
from pallas_kernels.hopper_reduce import PITCH, store_partial, write_rows
from pallas_kernels.hopper_row_sums import negative_row_sums
from pallas_kernels.problem import MatmulProblem


def unsupported_reason(problem: MatmulProblem, device: Device) -> str | None:
  """Why this kernel cannot take `problem` on `device`; None if it can."""
  if jax.__version_info__ < (0, 11):
    return f"it needs JAX 0.11, this is {jax.__version__}"
  if device.platform != "cuda":
    return f"it runs on NVIDIA GPUs, not on {device.platform}"
  if not any(name in device.kind for name in ("H100", "H200", "H20", "H800", "GH200")):
    return f"it runs on Hopper GPUs (compute capability 9.0), and {device.kind!r} is none that it knows"
  if problem.dtype not in (jnp.bfloat16, jnp.float16):
    return f"x must be bfloat16 or float16, not {problem.dtype}"
  if max(problem.k * problem.n // 4, problem.m * problem.k, problem.m * problem.n) >= 2**31:
    return "an operand of 2^31 elements or more is not tested"
  tile = problem.tile_k
  if problem.group_size != tile // 2 and problem.group_size % tile and problem.group_size != problem.k:
    return f"group_size={problem.group_size} must be {tile // 2}, a multiple of {tile} or the whole column"
  if problem.zeros and problem.group_size < min(layout.TILE, problem.k):
    return f"zero points need groups of at least {layout.TILE}, not group_size={problem.group_size}"
  return None


def _kernel(*refs, config, problem, biased, gated, k_tiles):
  """y[m, n] = sum over k of x[m, k] * s[k // group, n] * (code[k, n] - zero[k // group, n]) + bias[n].

  One program: block_n columns x block_m rows x one of split_k runs of K, a run of block_k steps in a ring of stages.

    copying warpgroup       wait for `empty`, start TMA copies (words, x, scales, zeros) that arrive on `full`
    adding warpgroup        with sum_zeros: wait for `full`, add up the stage's x, arrive on `summed`
    computing warpgroup     wgmma of tile t on 64 columns . x^T   (asynchronous)
      (n, j): column tile n   decode tile t + 1: 16 bytes a thread, shift, lop3, subtract -> registers of fragment A
      and the j-th part of  wait for tile t; after the last tile of a group, sum += partial * scale
      every stage's k
    the same, at the end    sums to shared memory, barrier over all that share the columns, each adds its share of the
                              rows in the order of K and writes it (hopper_reduce.py)

  With 2:4 sparse weights a tile of 64 columns has 128 k and 64 kept codes of each column, and the words of their
  positions go the way of those of the codes, to the tensor cores.

  Out of range, TMA reads zeros: x and scales are zero there, whatever the codes.
  """
  x_gmem, w_gmem, s_gmem, *others, y_gmem, ring, full, empty, ready, done, consumed, sums_smem, summed = refs
  bias_gmem = others.pop() if biased else None
  z_gmem, meta_gmem = ([], others) if problem.sparse24 else (others, [])
  (x_smem, w_smem, s_smem, z_smem, meta_smem), y_smem = ring
  c, tile_k = config, problem.tile_k
  stages, tiles = c.num_stages, c.block_k // tile_k
  tiles_each = tiles // c.warpgroups_k
  wg, nb, mb = (lax.axis_index(name) for name in ("wg", "n", "m"))
  sk = lax.axis_index("k") if c.split_k > 1 else 0
  first_step, steps = _run_of_steps(sk, -(-k_tiles // tiles), c.split_k)
  group_size = _group_size(problem, c)
  runs = c.groups_per_stage(problem)
  segment = _segment(problem, c)
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

      for gmem, smem in ((w_gmem, w_smem), *((meta, meta_smem) for meta in meta_gmem)):
        plgpu.copy_gmem_to_smem(
          gmem.at[pl.ds(nb * c.warpgroups_n, c.warpgroups_n), pl.ds(step * tiles, tiles)],
          smem.at[stage],
          full.at[stage],
        )
      plgpu.copy_gmem_to_smem(
        x_gmem.at[pl.ds(mb * c.block_m, c.block_m), pl.ds(step * c.block_k, c.block_k)],
        x_smem.at[stage],
        full.at[stage],
      )
      group = 0 if problem.group_size == problem.k else step * c.block_k // group_size
      for gmem, smem in ((s_gmem, s_smem), *((z, z_smem) for z in z_gmem)):
        plgpu.copy_gmem_to_smem(
          gmem.at[pl.ds(group, runs), pl.ds(nb * c.block_n, c.block_n)], smem.at[stage], full.at[stage]
        )

  if c.sum_zeros:

    @pl.when(wg == c.compute_warpgroups + 1)
    def add_up_x():
      plgpu.set_max_registers(FEW_REGISTERS, action="decrease")

      @pl.loop(0, steps)
      def _(t):
        stage = lax.rem(t, stages)
        plgpu.barrier_wait(full.at[stage])
        negative_row_sums(x_smem, sums_smem, stage)
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
        positions = plgpu.load(meta_smem.at[stage, column_tile, first_tile + tile], layout=POSITIONS)
        return weights(stage, tile), positions
      return weights(stage, tile), None

    def weights(stage, tile):
      with jax.named_scope("dequantize"):
        planes = [
          plgpu.load(w_smem.at[stage, column_tile, first_tile + tile, plane], layout=WORDS)
          for plane in range(problem.bits // 4)
        ]
        zero = None if c.sum_zeros else 0 if problem.zeros else 2 ** (problem.bits - 1)
        w = decode_tile(planes, dtype, zero=zero)
        if problem.zeros and not c.sum_zeros:
          w -= columns(of_group(z_smem, stage, tile * tile_k), w.shape)
        return w * columns(of_group(s_smem, stage, tile * tile_k), w.shape).astype(dtype) if c.scale_weights else w

    def index(k, length):
      """Which of a stage's runs of `length` the `k` of this warpgroup's part is in."""
      k += first_tile * tile_k
      return k // length if c.warpgroups_k == 1 else lax.div(k, length)

    def of_group(ref, stage, k):
      """The scales or zeros of the group that `k` of this warpgroup's part is in, one a column."""
      return plgpu.load(
        ref.at[stage, 0 if runs == 1 else index(k, group_size), pl.ds(column_tile * layout.TILE, layout.TILE)],
        layout=plgpu.Layout.WGMMA.reduce(1),
        optimized=False,
      )

    def columns(values, shape):
      """One value a column, over all of `shape`."""
      return lax.broadcast_in_dim(values, shape, [0])

    def beginning():
      """The sums to begin with: 0, and in the first share the bias."""
      shape = (layout.TILE, c.block_m)
      if not biased:
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

      def load():
        values = bias_gmem.at[pl.ds(first_column, layout.TILE)]
        return plgpu.load(values, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False).astype(jnp.float32)

      def nothing():
        return plgpu.layout_cast(jnp.zeros(layout.TILE, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

      return columns(lax.cond(share == 0, load, nothing) if c.reduces else load(), shape)

    def multiply(stage, acc, w, following):
      """acc + the step's product; `w` is the fragment of its first tile, the result has that of `following`."""
      partial, summed_waited = acc if c.scale_weights else None, False
      for tile in range(tiles_each):
        x = x_smem.at[stage, :, pl.ds((first_tile + tile) * tile_k, tile_k)]
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
          of_halves = [of_group(s_smem, stage, tile * tile_k + tile_k // 2 * half) for half in range(len(started))]
        if c.sum_zeros and group_ends:
          zeros = of_group(z_smem, stage, tile * tile_k)
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

    begin = beginning()
    plgpu.barrier_wait(full.at[0])
    carry, turns = (begin, fragment(0, 0)), 0
    if c.unroll:
      turns = lax.div(steps, stages)
      carry = lax.fori_loop(0, turns, turn, carry)
    acc, _ = lax.fori_loop(turns * stages, steps, lambda t, carry: step(t, carry, lax.rem(t, stages)), carry)

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
        y_gmem,
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


# A jit of its own: the layers of a model that are of one shape then share one trace, one lowering and one compilation
# of the kernel. Without it 56 layers took more than a minute, most of it in lowering.
@functools.partial(jax.jit, static_argnames=("gated", "config"))
def matmul_hopper(
  x: Float[Array, "M K"],
  qweight: Int16[Array, "N_tiles K_tiles rows 32"],
  scales: Float[Array, "G N"],
  zeros: Float[Array, "G N"] | None = None,
  meta: Int16[Array, "N_tiles K_tiles 32 16"] | None = None,
  bias: Float[Array, " N"] | None = None,
  *,
  gated: bool = False,
  config: HopperConfig,
) -> Float[Array, "M N_out"]:
  """y = x @ (scales * (codes - zeros)) + bias, dequantized in registers, summed in float32.

  The same bits at every call. 2:4 sparse weights go to sparse tensor cores: x is not multiplied where one is pruned,
  not even if it is Inf.

  Args:
    x: bfloat16 or float16; M at least 1.
    qweight: packed codes of 4 or 8 bits (layout.py), or the kept ones (layout24.py).
    scales: G = K / group_size rows, G = 1 for one group per column.
    zeros: zero points, like scales, rounded to x's dtype; None is the middle code.
    meta: positions of kept codes (layout24.py); None of a dense weight.
    bias: added in float32, before rounding.
    gated: columns are gates and ups in turns (layout.py), and y is silu(gate) * up, N / 2 columns.
    config: block sizes; see HopperConfig.

  Raises:
    ValueError: neither of config's block_k and the group size divides the other, config scales weights of groups of
      half a tile or sums zeros that there are not; block_k is too short for its tiles, or the stages do not fit into
      shared memory.
  """
  (m, k), (groups, n) = x.shape, scales.shape
  n_tiles, k_tiles, rows, _ = qweight.shape
  kind = dict(bits=rows // 8, zeros=zeros is not None, sparse24=meta is not None)
  problem = MatmulProblem(m=m, n=n, k=k, group_size=k // groups, dtype=x.dtype, **kind)
  if groups > 1 and config.block_k % problem.group_size and problem.group_size % config.block_k:
    raise ValueError(f"block_k={config.block_k} and group_size={problem.group_size}: one must divide the other")
  if config.sum_zeros and (zeros is None or problem.bits != 4 or problem.group_size < min(layout.TILE, k)):
    raise ValueError(f"sum_zeros needs zero points of 4 bits and groups of at least {layout.TILE}, not {problem}")
  tile_k = problem.tile_k
  if groups > 1 and problem.group_size < tile_k and config.scale_weights:
    raise ValueError(f"scale_weights needs groups of at least {tile_k}, not group_size={problem.group_size}")
  if config.block_k < tile_k * config.warpgroups_k * (1 + config.decode_ahead):
    raise ValueError(f"{config} has too short a block_k for tiles of {tile_k} k")
  runs = config.groups_per_stage(problem)
  most = config.max_stages(problem)
  if config.num_stages > most:
    raise ValueError(f"{config} with {runs} groups a stage has shared memory for {most} stages of {problem}")
  c = config
  tiles, planes = c.block_k // tile_k, problem.bits // 4
  if -(-k_tiles // tiles) < c.split_k:
    raise ValueError(f"split_k={c.split_k} must be at most the steps of block_k={c.block_k} in K={k}")
  # TMA reads rows of 16 bytes, x in pieces of 8 rows x 64 k; sizes that are no multiples are padded here.
  x = _pad(x, 8 if m > 8 else 1, layout.TILE)
  others = [_pad(scales, 1, 8)]
  if problem.zeros:
    others.append(_pad(zeros.astype(x.dtype), 1, 8))
  if problem.sparse24:
    others.append(meta.reshape(n_tiles, k_tiles, 4, 128))
  arrivals = 2 + len(others)  # copies of a stage
  if bias is not None:
    others.append(_pad(bias[None], 1, c.block_n)[0])
  SMEM, stages = plgpu.SMEM, c.num_stages
  y_dtype = jnp.dtype(jnp.float32) if c.reduces else x.dtype
  barrier = plgpu.Barrier
  if c.split_k > 1:
    barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("k",))
  ring = [
    SMEM((stages, c.block_m, c.block_k), x.dtype, transforms=X_TRANSFORMS),
    SMEM((stages, c.warpgroups_n, tiles, planes, 8, 128), jnp.int16),
    SMEM((stages, runs, c.block_n), scales.dtype),
    SMEM((stages, runs, c.block_n) if problem.zeros else (1, 1, 8), x.dtype),
    SMEM((stages, c.warpgroups_n, tiles, 4, 128) if problem.sparse24 else (1, 1, 1, 1, 8), jnp.int16),
  ]
  y_smem = SMEM((c.compute_warpgroups, c.block_m, PITCH[y_dtype.itemsize]), y_dtype)
  y = plgpu.kernel(
    functools.partial(_kernel, config=c, problem=problem, biased=bias is not None, gated=gated, k_tiles=k_tiles),
    out_type=jax.ShapeDtypeStruct((m, others[0].shape[1] // (1 + gated)), x.dtype),
    scratch_types=[
      plgpu.RefUnion(ring, y_smem) if c.y_in_ring else (ring, y_smem),
      plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
      plgpu.Barrier(num_arrivals=c.compute_warpgroups, num_barriers=stages),
      barrier(num_arrivals=c.warpgroups_k, num_barriers=c.warpgroups_n),
      barrier(num_arrivals=c.warpgroups_k, num_barriers=c.warpgroups_n),
      plgpu.Barrier(num_arrivals=c.compute_warpgroups),
      SMEM((stages, c.block_k // _segment(problem, c), c.block_m) if c.sum_zeros else (1, 1, 8), jnp.float32),
      plgpu.Barrier(num_arrivals=1, num_barriers=stages),
    ],
    grid=(-(-n_tiles // c.warpgroups_n), -(-m // c.block_m)),
    grid_names=("n", "m"),
    cluster=(c.split_k,) if c.split_k > 1 else (),
    cluster_names=("k",) if c.split_k > 1 else (),
    num_threads=c.warpgroups,
    thread_name="wg",
    kernel_name=f"w{problem.bits}a16_{'sparse24_' if problem.sparse24 else ''}hopper",
    compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
  )(x, qweight.reshape(n_tiles, k_tiles, planes, 8, 128), *others)
  return y[:, : n // (1 + gated)]


def _run_of_steps(program, total: int, programs: int):
  """(first, count) of the steps of one of the programs that share them; none is without, it would wait for ever."""
  first, end = (lax.div((program + i) * total, programs) for i in (0, 1))
  return first, end - first


def _group_size(problem: MatmulProblem, config: HopperConfig) -> int:
  """k that share a scale; a whole column has the same one in every step, however long the column is."""
  return problem.group_size if problem.group_size < problem.k else config.block_k


def _segment(problem: MatmulProblem, config: HopperConfig) -> int:
  """k of a step that one warpgroup sums before it scales."""
  return min(_group_size(problem, config), config.block_k // config.warpgroups_k)


def _pad(array, rows: int, columns: int):
  (r, c) = array.shape
  return jnp.pad(array, ((0, -r % rows), (0, -c % columns))) if r % rows or c % columns else array
