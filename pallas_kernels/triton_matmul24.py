# SPDX-License-Identifier: Apache-2.0
"""The Triton-lowered kernel of 2:4 sparse weights: sparse in memory, dense in the matrix instruction.

It reads 3 bits a weight instead of 4 and multiplies as the dense kernel does, zeros too. Sparse tensor cores cannot be
reached through Triton. On an H200 it is two to four times slower than the dense kernel (docs/kernel.md).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int16

from pallas_kernels import layout, layout24, triton_matmul
from pallas_kernels.dequant import nibble_plane
from pallas_kernels.hardware import Device
from pallas_kernels.problem import MatmulProblem
from pallas_kernels.triton_matmul import MAX_ELEMENTS, TritonConfig

# Bits of a word's coordinates, in memory order, then those that joining adds: place = 2 pair + e in the quad, and the
# nibble plane p = 2 half + odd (see layout.py and layout24.py).
_WORD_AXES = ("n_tile", "k_tile", "warp", "lane", "quad", "j", "e", "pair", "odd", "half")
# The same bits in the order of n = (n_tile, warp, odd, lane) and k = (k_tile, j, half, quad, pair, e).
_WEIGHT_AXES = ("n_tile", "warp", "odd", "lane", "k_tile", "j", "half", "quad", "pair", "e")


def unsupported_reason(problem: MatmulProblem, device: Device) -> str | None:
  """Why this kernel cannot take `problem` on `device`; None if it can."""
  if not problem.sparse24:
    return "it takes 2:4 sparse weights, not dense ones"
  if device.platform != "cuda":
    return f"it runs on NVIDIA GPUs, not on {device.platform}"
  if problem.dtype not in (jnp.bfloat16, jnp.float16):
    return f"x must be bfloat16 or float16, not {problem.dtype}"
  block_k = layout24.K_TILE
  if block_k % problem.group_size and problem.group_size % block_k and problem.group_size != problem.k:
    return f"group_size={problem.group_size} must divide {block_k}, be a multiple of it, or be the whole column"
  k, n = layout24.padded_shape(problem.k, problem.n)
  if max(k * n // 8, problem.m * k, problem.m * n) > MAX_ELEMENTS:
    return f"a {problem.m} x {k} x {n} product has an operand of more than 2^31 elements"
  return None


def _dequantize(words, meta, dtype, *, use_asm: bool):
  """Words [n_tiles, 1024 k_tiles] and [n_tiles, 512 k_tiles] -> code - 8, pruned ones 0, as [64 n_tiles, 128 k_tiles];
  times DECODED.

  The two kept values of a quad are neighbours of one thread. Their positions are not with them: each word of `meta` has
  the quads of four threads, so it is read by all four, who take a nibble each.
  """
  n_tiles, k_tiles = words.shape[0], words.shape[1] // layout.TILE_WORDS
  sizes = dict(n_tile=n_tiles, k_tile=k_tiles, warp=4, lane=8, quad=4, j=4, e=2, pair=2, odd=2, half=2)
  # k = 128 k_tile + 64 s + 16 block: block = 2 high + half, and the words' j = 2 s + high.
  meta = meta.reshape(n_tiles, k_tiles, 4, 8, 2, 2, 2, 2)  # ..., high, half, s, odd
  meta = meta.transpose(0, 1, 2, 3, 6, 4, 5, 7)  # ..., s, high, half, odd
  shifts = 4 * jnp.arange(4, dtype=jnp.int16)[:, None]  # the nibble of each thread of four

  def plane(half: int, odd: int):
    values = nibble_plane(words, 2 * half + odd, dtype, zero=layout.ZERO_CODE, use_asm=use_asm)
    first, second = _halves(values.reshape([sizes[axis] for axis in _WORD_AXES[:7]]))  # [..., quad, j]
    nibbles = _halves(_halves(meta)[odd])[half].reshape(n_tiles, k_tiles, 4, 8, 1, 4) >> shifts
    nothing = jnp.zeros_like(first)

    def at(place: int):
      return jnp.where((nibbles & 3) == place, first, jnp.where((nibbles >> 2 & 3) == place, second, nothing))

    return jnp.stack([jnp.stack([at(0), at(1)], axis=-1), jnp.stack([at(2), at(3)], axis=-1)], axis=-1)

  w = jnp.stack([jnp.stack([plane(half, odd) for odd in range(2)], axis=-1) for half in range(2)], axis=-1)
  w = w.transpose([_WORD_AXES.index(axis) for axis in _WEIGHT_AXES])
  return w.reshape(n_tiles * layout.TILE, k_tiles * layout24.K_TILE)


def _halves(array):
  """Both elements of a last axis of two."""
  return [half.reshape(array.shape[:-1]) for half in jnp.split(array, 2, axis=-1)]


def load_weights(w_ref, meta_ref, column, step, *, problem, config, use_asm):
  """Codes - 8 of block (column, step) in problem.dtype, pruned ones 0, as [block_n, 128] in natural order; times
  `triton_matmul.decoded_factor`.
  """
  n_tiles = config.block_n // layout.TILE

  def load(ref, tile_words):
    index = pl.ds(column * n_tiles, n_tiles), pl.ds(step * tile_words, tile_words)
    return plt.load(ref.at[index], eviction_policy="evict_first")

  words, meta = load(w_ref, layout.TILE_WORDS), load(meta_ref, layout24.META_WORDS)
  return _dequantize(words, meta, problem.dtype, use_asm=use_asm)


def _kernel(x_ref, w_ref, meta_ref, scales_ref, *refs, problem, config, use_asm):
  """y[part, m, n] = sum over a part of k of x[m, k] * s[k // group, n] * (code[k, n] - 8).

  `triton_matmul.sum_product` with 2:4 sparse weights. A step loads a row of tiles, 2 KiB of kept codes and 1 KiB of
  positions for 64 columns x 128 k, and expands them to w [block_n, 128] in registers.
  """
  bias_ref, y_ref = refs if len(refs) == 2 else (None, *refs)

  def load(column, i):
    return load_weights(w_ref, meta_ref, column, i, problem=problem, config=config, use_asm=use_asm)

  triton_matmul.sum_product(x_ref, [scales_ref], bias_ref, y_ref, load, problem=problem, config=config)


# A jit of its own: the layers of a model that are of one shape then share one trace and one lowering of the kernel.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def matmul_triton24(
  x: Float[Array, "M K"],
  qweight: Int16[Array, "N_tiles K_tiles 32 32"],
  meta: Int16[Array, "N_tiles K_tiles 32 16"],
  scales: Float[Array, "G N"],
  bias: Float[Array, " N"] | None = None,
  *,
  config: TritonConfig,
  interpret: bool = False,
) -> Float[Array, "M N"]:
  """y = x @ (scales * (codes - 8)) + bias with 2:4 sparse codes, summed in float32; the same bits at every call.

  Args:
    x: bfloat16 or float16; M at least 1.
    qweight, meta: packed codes and positions (layout24.py).
    scales: G = K / group_size rows, G = 1 for one group per column.
    bias: added in float32, before rounding.
    config: block sizes, block_k=128; see TritonConfig.
    interpret: run the kernel's body on the CPU, for tests.

  Raises:
    ValueError: block_k is not 128, or does not fit the group size, or block_n does not divide the padded N.
  """
  (m, k), (groups, n) = x.shape, scales.shape
  problem = MatmulProblem(m=m, n=n, k=k, group_size=k // groups, dtype=x.dtype, sparse24=True)
  n_tiles = qweight.shape[0]
  operands = x, qweight.reshape(n_tiles, -1), meta.reshape(n_tiles, -1), scales, *(() if bias is None else (bias,))
  kernel = functools.partial(_kernel, problem=problem, config=config, use_asm=not interpret)
  name = "w4a16_sparse24_triton"
  return triton_matmul.launch(kernel, operands, problem=problem, config=config, interpret=interpret, name=name)
