# SPDX-License-Identifier: Apache-2.0
"""The packed layout of 4-bit weights: one buffer that both the Triton and the Mosaic lowering read without a shuffle.

A 64 (k) x 64 (n) tile of codes is 1024 int16 words, 2 KiB in a row, stored as `qweight [N/64, K/64, 32, 32]`. Each
word holds four codes, nibble p in bits 4p..4p+3. Nibble p of all words of a tile is a 32 x 32 sub-matrix of it,

    word (r, c), nibble p  is the code of   n = 16 (r // 8) + 8 (p % 2) + r % 8
                                            k = 16 (c // 2 % 4) + 8 (p // 2) + 2 (c // 8) + c % 2

so p % 2 picks a run of eight columns in every sixteen, p // 2 a run of eight k in every sixteen:

    word       15      12 11       8 7        4 3        0
              | n+8, k+8 |   n, k+8 |   n+8, k |     n, k |        n, k of nibble 0

Why this order: in a matrix instruction with the weights on the left (wgmma, mma.m16n8k16; PTX ISA, "Matrix fragments
for wgmma.mma_async.m64nNk16"), thread t of 128 owns, of a 64 x 64 operand, rows 16 (t // 32) + t % 32 // 4 (+ 8) and
columns 2 (t % 4) + {0, 1} (+ 8 i). Words 8t .. 8t+7 of a tile (row r = t // 4, c = 8 (t % 4) .. + 7) hold exactly
those 32 codes: one 16-byte load per thread, and `word pair >> 4p & 0x000F000F` is a register of the fragment. A
Mosaic kernel says so itself; in a Triton kernel the four nibble planes are joined and their index bits transposed to
the natural order of n and k, which its compiler finds to be a renaming of registers.

N is padded to a multiple of 64 and K to one of 128 with codes that dequantize to zero, once, at packing time; the
logical sizes are those of `scales` and `x`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Int16

TILE = 64  # codes along either side of a tile
TILE_WORDS = TILE * TILE // 4
K_MULTIPLE = 2 * TILE  # a K step of 128 then never ends inside the buffer, whatever K is
ZERO_CODE = 8  # the code of weight 0 in symmetric quantization


def padded_shape(k: int, n: int) -> tuple[int, int]:
  """(K, N) of the packed buffer of a [k, n] weight."""
  return -(-k // K_MULTIPLE) * K_MULTIPLE, -(-n // TILE) * TILE


def qweight_shape(k: int, n: int) -> tuple[int, int, int, int]:
  """Shape of the packed buffer of a [k, n] weight, in int16 words."""
  k_padded, n_padded = padded_shape(k, n)
  return n_padded // TILE, k_padded // TILE, 32, 32


def plane_k(c, p_half: int):
  """k inside a tile of column `c` (0..31) of the nibble planes with p // 2 == p_half; works on ints and arrays."""
  return 16 * (c // 2 % 4) + 8 * p_half + 2 * (c // 8) + c % 2


def plane_n(r, p_odd: int):
  """n inside a tile of row `r` (0..31) of the nibble planes with p % 2 == p_odd; works on ints and arrays."""
  return 16 * (r // 8) + 8 * p_odd + r % 8


# The bits of n and k inside a tile, most significant first, as axes of a reshaped tile:
#   n = 16 warp + 8 odd + lane          (4, 2, 8)
#   k = 16 j + 8 half + 2 quad + e      (4, 2, 4, 2)
# and of the words: r = 8 warp + lane, c = 8 quad + 2 j + e, p = 2 half + odd.
_TILE_AXES = dict(k_tile=0, j=1, half=2, quad=3, e=4, n_tile=5, warp=6, odd=7, lane=8)
_WORD_AXES = ("n_tile", "k_tile", "warp", "lane", "quad", "j", "e", "half", "odd")


def pack_codes(codes: Int8[Array, "K N"]) -> Int16[Array, "N_tiles K_tiles 32 32"]:
  """Packs codes 0..15 into kernel order; pure jnp, jit-able. Other values are the caller's mistake and not looked at.

  Returns:
    int16 words of shape `qweight_shape(K, N)`; the padding holds the code of zero.
  """
  k, n = codes.shape
  k_padded, n_padded = padded_shape(k, n)
  codes = jnp.pad(codes, ((0, k_padded - k), (0, n_padded - n)), constant_values=ZERO_CODE)
  tiles = codes.astype(jnp.uint16).reshape(k_padded // TILE, 4, 2, 4, 2, n_padded // TILE, 4, 2, 8)
  nibbles = tiles.transpose([_TILE_AXES[axis] for axis in _WORD_AXES]).reshape(*qweight_shape(k, n), 4)
  words = nibbles << jnp.arange(0, 16, 4, dtype=jnp.uint16)
  return jax.lax.bitcast_convert_type(words.sum(-1, dtype=jnp.uint16), jnp.int16)


def unpack_codes(qweight: Int16[Array, "N_tiles K_tiles 32 32"], k: int, n: int) -> Int8[Array, "K N"]:
  """The codes 0..15 of a packed [k, n] weight: the inverse of `pack_codes`; pure jnp, jit-able.

  Raises:
    ValueError: the buffer is not that of a [k, n] weight.
  """
  if qweight.shape != qweight_shape(k, n):
    raise ValueError(f"{qweight.shape=} is not the packed shape {qweight_shape(k, n)} of a weight with {k=}, {n=}")
  n_tiles, k_tiles, _, _ = qweight.shape
  nibbles = (qweight[..., None] >> jnp.arange(0, 16, 4, dtype=jnp.int16)).astype(jnp.int8) & 15
  words = nibbles.reshape(n_tiles, k_tiles, 4, 8, 4, 4, 2, 2, 2)
  tiles = words.transpose(np.argsort([_TILE_AXES[axis] for axis in _WORD_AXES]))
  return tiles.reshape(k_tiles * TILE, n_tiles * TILE)[:k, :n]
