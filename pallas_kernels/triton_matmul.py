# SPDX-License-Identifier: Apache-2.0
"""The Triton-lowered kernel: runs on every NVIDIA GPU since Ampere and on both JAX lines."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int16

from pallas_kernels import layout
from pallas_kernels.dequant import nibble_plane
from pallas_kernels.hardware import Device
from pallas_kernels.problem import MatmulProblem

# Element offsets inside the kernel are 32-bit; Pallas widens them only above 2^32 elements.
_MAX_ELEMENTS = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TritonConfig:
  """What one program computes, and how.

  Attributes:
    block_m: rows of x, the narrow side of the matrix instruction; a power of two, at least 16.
    block_n: columns, a multiple of the layout's 64 that is a power of two.
    block_k: k per loop step: 32, 64 or 128. It must divide the group size (a step has one scale per column).
    split_k: programs that share one output block; each sums a run of K, a second pass adds the runs in order.
    num_warps, num_stages: Triton's threads / 32 and depth of its load pipeline.
  """

  block_m: int
  block_n: int
  block_k: int
  split_k: int
  num_warps: int
  num_stages: int

  def __post_init__(self):
    for name, allowed in dict(
      block_m=(16, 32, 64, 128, 256), block_n=(64, 128, 256), block_k=(32, 64, 128), num_warps=(1, 2, 4, 8, 16)
    ).items():
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name}={getattr(self, name)} must be one of {allowed}")
    if self.split_k < 1 or self.num_stages < 1:
      raise ValueError(f"split_k={self.split_k} and num_stages={self.num_stages} must be at least 1")


def unsupported_reason(problem: MatmulProblem, device: Device) -> str | None:
  """Why this kernel cannot take `problem` on `device`; None if it can."""
  if device.platform != "cuda":
    return f"it runs on NVIDIA GPUs, not on {device.platform}"
  if problem.dtype not in (jnp.bfloat16, jnp.float16):
    return f"x must be bfloat16 or float16, not {problem.dtype}"
  if problem.group_size not in (32, 64) and problem.group_size % 128 and problem.group_size != problem.k:
    return f"group_size={problem.group_size} must be 32, 64, a multiple of 128 or the whole column"
  k, n = layout.padded_shape(problem.k, problem.n)
  if max(k * n // 4, problem.m * k, problem.m * n) > _MAX_ELEMENTS:
    return f"a {problem.m} x {k} x {n} product has an operand of more than 2^31 elements"
  return None


def _kernel(x_ref, w_ref, s_ref, y_ref, *, problem, config, k_tiles, use_asm):
  """y[sk, m, n] = sum over the sk-th run of k of x[m, k] * s[k // group, n] * (code[k, n] - 8).

  One program: block_n columns x block_m rows x one of split_k runs of K.

    load    words [block_n / 2, block_k / 2], x [block_m, block_k / 2] twice, scales      (pipelined num_stages deep)
    decode  four nibble planes [block_n / 2, block_k / 2] in registers
    dot     acc[n half] += plane(n half, k half) . x(k half)^T        weights on the left: on Hopper the register
            operand of wgmma, and a few rows of x cost a narrow instruction instead of padding to 64
    scale   on the float32 sum of the step, block_m multiplications a column instead of block_k

  The planes are 32 x 32 sub-matrices of a tile (layout.py), so two accumulators hold the two n halves, and x is read
  in the order of plane_k: pairs of neighbours, gathered from L2 by index arithmetic instead of permuting x in a
  launch of its own.
  """
  c = config
  m0, n_block, sk = pl.program_id(0) * c.block_m, pl.program_id(1), pl.program_id(2)
  rows, cols = jnp.arange(c.block_n // 2, dtype=jnp.int32), jnp.arange(c.block_k // 2, dtype=jnp.int32)
  n_tile = n_block * (c.block_n // layout.TILE) + rows // 32
  row_words = n_tile * (k_tiles * layout.TILE_WORDS) + rows % 32 * 32
  n_of = [n_tile * layout.TILE + layout.plane_n(rows % 32, odd) for odd in range(2)]
  m = m0 + jnp.arange(c.block_m, dtype=jnp.int32)
  steps_total = k_tiles * layout.TILE // c.block_k
  steps_each = -(-steps_total // c.split_k)
  grouped = problem.group_size < problem.k

  def column_of(step):
    """(word offset in the row of tiles, k of half 0) of the columns of one step; half 1 is 8 further."""
    if c.block_k == 32:  # half a tile: of every eight columns of a plane, the four with j // 2 == step % 2
      tile, column = step // 2, 8 * (cols // 4) + 4 * (step % 2) + cols % 4
    else:
      tile, column = step * (c.block_k // layout.TILE) + cols // 32, cols % 32
    return tile * layout.TILE_WORDS + column, tile * layout.TILE + layout.plane_k(column, 0)

  def step(i, accs):
    words_at, k_at = column_of(i)
    words = plt.load(w_ref.at[row_words[:, None] + words_at[None, :]], eviction_policy="evict_first")
    partial = [None, None]
    for half in range(2):
      k = k_at + 8 * half
      x = plt.load(
        x_ref.at[jnp.broadcast_to(m[:, None], (c.block_m, k.size)), jnp.broadcast_to(k[None, :], (c.block_m, k.size))],
        mask=(m < problem.m)[:, None] & (k < problem.k)[None, :],
        other=0.0,
      )
      for odd in range(2):
        plane = nibble_plane(words, 2 * half + odd, x.dtype, use_asm=use_asm)
        dot = lax.dot_general(plane, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        partial[odd] = dot if half == 0 else partial[odd] + dot
    return tuple(accs[odd] + scaled(partial[odd], odd, i * c.block_k // problem.group_size) for odd in range(2))

  def scaled(partial, odd, group):
    if not grouped:
      return partial  # once, after the loop
    return partial * load_scales(odd, group)

  def load_scales(odd, group):
    # The K padding lies beyond the last group: its codes are zero, any finite scale will do.
    group = jnp.minimum(group, problem.k // problem.group_size - 1)
    s = plt.load(s_ref.at[jnp.full_like(rows, group), n_of[odd]], mask=n_of[odd] < problem.n, other=0.0)
    return s.astype(jnp.float32)[:, None]

  zeros = jnp.zeros((c.block_n // 2, c.block_m), jnp.float32)
  first = sk * steps_each
  accs = lax.fori_loop(first, jnp.minimum(first + steps_each, steps_total), step, (zeros, zeros))
  for odd in range(2):
    acc = accs[odd] if grouped else accs[odd] * load_scales(odd, 0)
    shape = acc.shape
    index = (sk, jnp.broadcast_to(m[None, :], shape), jnp.broadcast_to(n_of[odd][:, None], shape))
    mask = (m < problem.m)[None, :] & (n_of[odd] < problem.n)[:, None]
    plt.store(y_ref.at[index], acc.astype(y_ref.dtype), mask=mask)


def matmul_triton(
  x: Float[Array, "M K"],
  qweight: Int16[Array, "N_tiles K_tiles 32 32"],
  scales: Float[Array, "G N"],
  *,
  config: TritonConfig,
  interpret: bool = False,
) -> Float[Array, "M N"]:
  """y = x @ (scales * (codes - 8)), dequantized in registers, accumulated in float32; the same bits at every call.

  Args:
    x: bfloat16 or float16; M at least 1.
    qweight: packed codes (layout.py).
    scales: G = K / group_size rows, G = 1 for one group per column.
    config: block sizes; see TritonConfig.
    interpret: run the kernel's body on the CPU, for tests.

  Raises:
    ValueError: config's block_k does not divide the group size.
  """
  (m, k), (groups, n) = x.shape, scales.shape
  problem = MatmulProblem(m=m, n=n, k=k, group_size=k // groups, dtype=x.dtype)
  if groups > 1 and problem.group_size % config.block_k:
    raise ValueError(f"block_k={config.block_k} must divide group_size={problem.group_size}")
  n_tiles, k_tiles, _, _ = qweight.shape
  n_blocks = -(-n_tiles * layout.TILE // config.block_n)
  kernel = functools.partial(_kernel, problem=problem, config=config, k_tiles=k_tiles, use_asm=not interpret)
  partials = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((config.split_k, m, n), jnp.float32 if config.split_k > 1 else x.dtype),
    grid=(-(-m // config.block_m), n_blocks, config.split_k),
    compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
    interpret=interpret,
    name="w4a16_triton",
  )(x, qweight.reshape(-1), scales)
  if config.split_k == 1:
    return partials[0]
  # In the order of K, so that the result is the same at every call; XLA fuses it with what follows.
  return partials.sum(0).astype(x.dtype)
