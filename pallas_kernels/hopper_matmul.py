# SPDX-License-Identifier: Apache-2.0
"""The Mosaic GPU kernel for Hopper: weights as the register operand of wgmma, the batch as its narrow side."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int16

from pallas_kernels import layout
from pallas_kernels.hardware import H200, Device
from pallas_kernels.hopper_fragments import (
  WORDS,
  X_TRANSFORMS,
  decode_tile,
  mma_issue,
  mma_wait,
  store_transposed,
)
from pallas_kernels.problem import MatmulProblem

_COPY_REGISTERS = 32
_LAUNCH_REGISTERS = {3: 168, 4: 128, 5: 96}  # per thread, by warpgroups of a program


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HopperConfig:
  """What one program computes, and how.

  Attributes:
    block_m: rows of x, the N of the matrix instruction.
    num_compute_warpgroups: each owns 64 columns; one more warpgroup copies.
    block_k: k per pipeline stage.
    num_stages: stages in shared memory.
    split_k: programs that share one output block; each sums a run of K, a second pass adds the runs in order.
    scale_weights: multiply the weights, rounding them to x's dtype, and not each group's float32 sum. Costs
      64 / block_m of the other way for groups of 128 and saves a second accumulator.
    decode_ahead: dequantize the next tile while the tensor cores work on this one. Needs two tiles a stage: with one,
      both fragments would be the same loop-carried registers, and ptxas serialises the kernel (its note C7513).
  """

  block_m: int
  num_compute_warpgroups: int
  block_k: int
  num_stages: int
  split_k: int = 1
  scale_weights: bool = False
  decode_ahead: bool = True

  def __post_init__(self):
    for name, allowed in dict(
      block_m=(8, 16, 32, 64, 128, 256), num_compute_warpgroups=(2, 3, 4), block_k=(64, 128, 256, 512)
    ).items():
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name}={getattr(self, name)} must be one of {allowed}")
    if self.split_k < 1 or self.num_stages < 2:
      raise ValueError(f"split_k={self.split_k} must be at least 1 and num_stages={self.num_stages} at least 2")
    if self.decode_ahead and self.block_k == layout.TILE:
      raise ValueError(f"decode_ahead needs block_k={self.block_k} to be at least {2 * layout.TILE}")
    if self.num_stages > self.max_stages():
      raise ValueError(
        f"num_stages={self.num_stages} of {self} must be at most {self.max_stages()} to fit shared memory"
      )
    # Accumulators, two fragments, and what addresses and the loop take.
    needed = self.block_m // 2 * (1 if self.scale_weights else 2) + 16 * (1 + self.decode_ahead) + 16
    if needed > self.compute_registers:
      raise ValueError(f"{self} needs some {needed} registers a thread; {self.compute_registers} can be had")

  @property
  def block_n(self) -> int:
    """Columns of one program."""
    return layout.TILE * self.num_compute_warpgroups

  @property
  def compute_registers(self) -> int:
    """Registers of a computing thread.

    A warpgroup that asks for more waits until another one has given enough away: for ever, if the sum over all
    warpgroups exceeds what the program was launched with, which is the register file divided by its threads and
    rounded down to a multiple of 8.
    """
    warpgroups = self.num_compute_warpgroups + 1
    pool = warpgroups * _LAUNCH_REGISTERS[warpgroups]
    return min(240, (pool - _COPY_REGISTERS) // self.num_compute_warpgroups // 8 * 8)

  def max_stages(self, groups_per_stage: int = 1) -> int:
    """Stages that fit into shared memory beside the output block and the barriers, with float32 scales."""
    words = self.block_n * self.block_k // 2
    stage = words + self.block_m * self.block_k * 2 + groups_per_stage * self.block_n * 4
    y = self.block_m * self.block_n * (2 if self.split_k == 1 else 4)
    return (H200.shared_memory - y - 2048) // stage


def unsupported_reason(problem: MatmulProblem, device: Device) -> str | None:
  """Why this kernel cannot take `problem` on `device`; None if it can."""
  if jax.__version_info__ < (0, 11):
    return f"it needs JAX 0.11, this is {jax.__version__}"
  if device.platform != "cuda":
    return f"it runs on NVIDIA GPUs, not on {device.platform}"
  if not any(name in device.kind for name in ("H100", "H200", "H20", "H800", "GH200")):
    return f"it runs on Hopper GPUs (compute capability 9.0), and {device.kind!r} is none that it knows"
  if problem.bits != 4 or problem.zeros:
    return f"it takes 4 bits without zero points, not bits={problem.bits}, zeros={problem.zeros}"
  if problem.dtype not in (jnp.bfloat16, jnp.float16):
    return f"x must be bfloat16 or float16, not {problem.dtype}"
  if max(problem.k * problem.n // 4, problem.m * problem.k, problem.m * problem.n) >= 2**31:
    return "an operand of 2^31 elements or more is not tested"
  if problem.group_size != 32 and problem.group_size % 64 and problem.group_size != problem.k:
    return f"group_size={problem.group_size} must be 32, a multiple of 64 or the whole column"
  return None


def _kernel(x_gmem, w_gmem, s_gmem, y_gmem, x_smem, w_smem, s_smem, y_smem, full, empty, *, config, problem, k_tiles):
  """y[sk, m, n] = sum over the sk-th run of k of x[m, k] * s[k // group, n] * (code[k, n] - 8).

  One program: block_n columns x block_m rows x one of split_k runs of K, a run of block_k steps in a ring of stages.

    copying warpgroup       wait for `empty`, start three TMA copies (words, x, scales) that arrive on `full`
    computing warpgroup     wgmma of tile t on 64 columns . x^T   (asynchronous)
      (one for each            decode tile t + 1: 16 bytes a thread, shift, lop3, subtract -> registers of fragment A
      64 columns)           wait for tile t; after the last tile of a group, sum += partial * scale

  Out of range, TMA reads zeros: x and scales are zero there, whatever the codes. It writes no rows beyond M.
  """
  c = config
  compute_wgs, stages = c.num_compute_warpgroups, c.num_stages
  tiles = c.block_k // layout.TILE
  wg, nb, mb, sk = (lax.axis_index(name) for name in ("wg", "n", "m", "k"))
  steps_total = -(-k_tiles // tiles)
  steps_each = -(-steps_total // c.split_k)
  first_step = sk * steps_each
  steps = jnp.minimum(steps_each, steps_total - first_step)
  group_size = _group_size(problem, c)
  runs = max(1, c.block_k // group_size)  # scale groups in a step
  dtype = problem.dtype

  @pl.when(wg == compute_wgs)
  def copy():
    plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

    @pl.loop(0, steps)
    def _(t):
      stage, step = lax.rem(t, stages), first_step + t

      @pl.when(t >= stages)
      def _():
        plgpu.barrier_wait(empty.at[stage])

      plgpu.copy_gmem_to_smem(
        w_gmem.at[pl.ds(nb * compute_wgs, compute_wgs), pl.ds(step * tiles, tiles)], w_smem.at[stage], full.at[stage]
      )
      plgpu.copy_gmem_to_smem(
        x_gmem.at[pl.ds(mb * c.block_m, c.block_m), pl.ds(step * c.block_k, c.block_k)],
        x_smem.at[stage],
        full.at[stage],
      )
      group = 0 if problem.group_size == problem.k else step * c.block_k // group_size
      plgpu.copy_gmem_to_smem(
        s_gmem.at[pl.ds(group, runs), pl.ds(nb * c.block_n, c.block_n)], s_smem.at[stage], full.at[stage]
      )

  @pl.when(wg < compute_wgs)
  def compute():
    plgpu.set_max_registers(c.compute_registers, action="increase")

    def fragment(stage, tile):
      with jax.named_scope("dequantize"):
        words = plgpu.load(w_smem.at[stage, wg, tile], layout=WORDS)
        w = decode_tile(words, dtype)
        return w * scale_of(stage, tile * layout.TILE, w.shape).astype(dtype) if c.scale_weights else w

    def scale_of(stage, k, shape):
      row = 0 if runs == 1 else k // group_size
      s = plgpu.load(
        s_smem.at[stage, row, pl.ds(wg * layout.TILE, layout.TILE)],
        layout=plgpu.Layout.WGMMA.reduce(1),
        optimized=False,
      )
      return lax.broadcast_in_dim(s if c.scale_weights else s.astype(jnp.float32), shape, [0])

    def multiply(stage, acc, w, following):
      """acc + the step's product; `w` is the fragment of its first tile, the result has that of `following`."""
      partial = acc if c.scale_weights else None
      for tile in range(tiles):
        x = x_smem.at[stage, :, pl.ds(tile * layout.TILE, layout.TILE)]
        if group_size < layout.TILE:
          started = [mma_issue(w, x, None, k_steps=(2 * half, 2 * half + 2)) for half in range(2)]
        else:
          started = [mma_issue(w, x, partial)]

        def decode_next(tile=tile):
          if tile + 1 < tiles:
            return fragment(stage, tile + 1)
          return None if following is None else following()

        if c.decode_ahead:
          w = decode_next()
        done = mma_wait(*started)
        if not c.decode_ahead:
          w = decode_next()
        end = (tile + 1) * layout.TILE
        if c.scale_weights:
          acc = partial = done[0]
        elif len(done) == 2 or end % min(group_size, c.block_k) == 0 or tile + 1 == tiles:
          for half, part in enumerate(done):
            acc += part * scale_of(stage, tile * layout.TILE + 32 * half, part.shape)
          partial = None
        else:
          partial = done[0]
      return acc, w

    def release(t, stage):
      # Only if the copying warpgroup will wait for it: a program must not end while its neighbour still signals it.
      @pl.when(t + stages < steps)
      def _():
        plgpu.barrier_arrive(empty.at[stage])

    def step(t, carry):
      acc, w = carry
      stage, next_stage = lax.rem(t, stages), lax.rem(t + 1, stages)

      def following():
        plgpu.barrier_wait(full.at[next_stage])
        return fragment(next_stage, 0)

      acc, w = multiply(stage, acc, w, following)
      release(t, stage)
      return acc, w

    plgpu.barrier_wait(full.at[0])
    zero = plgpu.layout_cast(jnp.zeros((layout.TILE, c.block_m), jnp.float32), plgpu.Layout.WGMMA)
    acc, w = lax.fori_loop(0, steps - 1, step, (zero, fragment(0, 0)))
    acc, _ = multiply(lax.rem(steps - 1, stages), acc, w, None)

    # Columns beyond N are not left to TMA to clip: where N is one tile wide, a copy beside it lands in the next row.
    @pl.when((nb * compute_wgs + wg) * layout.TILE < y_gmem.shape[2])
    @jax.named_scope("store")
    def _():
      tile = y_smem.at[wg]
      store_transposed(acc.astype(y_gmem.dtype), tile)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        tile, y_gmem.at[sk, pl.ds(mb * c.block_m, c.block_m), pl.ds((nb * compute_wgs + wg) * layout.TILE, layout.TILE)]
      )
      plgpu.wait_smem_to_gmem(0)


# A jit of its own: the layers of a model that are of one shape then share one trace, one lowering and one compilation
# of the kernel. Without it 56 layers took more than a minute, most of it in lowering.
@functools.partial(jax.jit, static_argnames=("config",))
def matmul_hopper(
  x: Float[Array, "M K"],
  qweight: Int16[Array, "N_tiles K_tiles 32 32"],
  scales: Float[Array, "G N"],
  *,
  config: HopperConfig,
) -> Float[Array, "M N"]:
  """y = x @ (scales * (codes - 8)), dequantized in registers, accumulated in float32; the same bits at every call.

  Args:
    x: bfloat16 or float16; M at least 1.
    qweight: packed codes (layout.py).
    scales: G = K / group_size rows, G = 1 for one group per column.
    config: block sizes; see HopperConfig.

  Raises:
    ValueError: neither of config's block_k and the group size divides the other, or config scales weights of groups
      of 32; or the stages do not fit into shared memory.
  """
  (m, k), (groups, n) = x.shape, scales.shape
  problem = MatmulProblem(m=m, n=n, k=k, group_size=k // groups, dtype=x.dtype)
  if groups > 1 and config.block_k % problem.group_size and problem.group_size % config.block_k:
    raise ValueError(f"block_k={config.block_k} and group_size={problem.group_size}: one must divide the other")
  if groups > 1 and problem.group_size < layout.TILE and config.scale_weights:
    raise ValueError(f"scale_weights needs groups of at least {layout.TILE}, not group_size={problem.group_size}")
  runs = max(1, config.block_k // _group_size(problem, config))
  if config.num_stages > config.max_stages(runs):
    raise ValueError(f"{config} with {runs} groups a stage has shared memory for {config.max_stages(runs)} stages")
  n_tiles, k_tiles, _, _ = qweight.shape
  c = config
  tiles = c.block_k // layout.TILE
  steps = -(-k_tiles // tiles)
  c = dataclasses.replace(c, split_k=-(-steps // -(-steps // c.split_k)))  # every run has a step
  # TMA reads rows of 16 bytes, x in pieces of 8 rows x 64 k; sizes that are no multiples are padded here.
  x = _pad(x, 8 if m > 8 else 1, layout.TILE)
  scales = _pad(scales, 1, 8)
  y_dtype = x.dtype if c.split_k == 1 else jnp.float32
  SMEM, stages = plgpu.SMEM, c.num_stages
  wgs = c.num_compute_warpgroups
  y = plgpu.kernel(
    functools.partial(_kernel, config=c, problem=problem, k_tiles=k_tiles),
    out_type=jax.ShapeDtypeStruct((c.split_k, m, scales.shape[1]), y_dtype),
    scratch_types=dict(
      x_smem=SMEM((stages, c.block_m, c.block_k), x.dtype, transforms=X_TRANSFORMS),
      w_smem=SMEM((stages, wgs, tiles, 8, 128), jnp.int16),
      s_smem=SMEM((stages, runs, c.block_n), scales.dtype),
      y_smem=SMEM((wgs, c.block_m, layout.TILE), y_dtype),
      full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    ),
    grid=(-(-n_tiles // wgs), -(-m // c.block_m), c.split_k),
    grid_names=("n", "m", "k"),
    num_threads=wgs + 1,
    thread_name="wg",
    kernel_name="w4a16_hopper",
    compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
  )(x, qweight.reshape(n_tiles, k_tiles, 8, 128), scales)
  if c.split_k > 1:
    # In the order of K, so that the result is the same at every call; XLA fuses it with what follows.
    y = y.sum(0, keepdims=True).astype(x.dtype)
  return y[0, :, :n]


def _group_size(problem: MatmulProblem, config: HopperConfig) -> int:
  """k that share a scale; a whole column has the same one in every step, however long the column is."""
  return problem.group_size if problem.group_size < problem.k else config.block_k


def _pad(array, rows: int, columns: int):
  (r, c) = array.shape
  return jnp.pad(array, ((0, -r % rows), (0, -c % columns))) if r % rows or c % columns else array
