# SPDX-License-Identifier: Apache-2.0
"""The packed layout of 4- and 8-bit weights: one buffer that the Triton and the Mosaic lowering read without a shuffle.

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

8 bits are two 4-bit tiles one after the other, `qweight [N/64, K/64, 64, 32]`: rows 0..31 hold the high nibbles of the
tile's codes, rows 32..63 the low ones, each packed as above. code - 128 = 16 (high - 8) + low, exact in bfloat16 and
fp16: a kernel decodes 8 bits with its 4-bit decoder, twice, and one fused multiply-add. `qweight.shape[2] // 8` is the
number of bits.

Gated columns, of a layer that computes silu(x @ gate) * (x @ up), are eight of gate and eight of up in turns: rows n
and n + 8 of a fragment, so that a thread has the sums of both.

N is padded to a multiple of 64 and K to one of 128 with codes that stand for zero without zero points, once, at packing
time; the logical sizes are those of `scales` and `x`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int16, UInt8

TILE = 64  # codes along either side of a tile
TILE_WORDS = TILE * TILE // 4
K_MULTIPLE = 2 * TILE  # a K step of 128 then never ends inside the buffer, whatever K is
ZERO_CODE = 8  # the code of weight 0 in symmetric quantization to 4 bits


def zero_code(bits: int) -> int:
  """The code of weight 0 in symmetric quantization: 8 of 0..15, 128 of 0..255."""
  return 1 << bits - 1


def padded_shape(k: int, n: int) -> tuple[int, int]:
  """(K, N) of the packed buffer of a [k, n] weight."""
  return -(-k // K_MULTIPLE) * K_MULTIPLE, -(-n // TILE) * TILE


def gated_order(n: int) -> Int[np.ndarray, " N"]:
  """Which of the n columns [gate, up] stands where among gated ones.

  Raises:
    ValueError: n is no multiple of 16.
  """
  if n % 16:
    raise ValueError(f"{n=} must be a multiple of 16 for columns of gate and up, eight in turns")
  return np.arange(n).reshape(2, -1, 8).swapaxes(0, 1).ravel()


def qweight_shape(k: int, n: int, bits: int = 4) -> tuple[int, int, int, int]:
  """Shape of the packed buffer of a [k, n] weight of 4- or 8-bit codes, in int16 words."""
  k_padded, n_padded = padded_shape(k, n)
  return n_padded // TILE, k_padded // TILE, 8 * bits, 32


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


@partial(jax.jit, static_argnames=("bits",))
def pack_codes(codes: UInt8[Array, "K N"], bits: int = 4) -> Int16[Array, "N_tiles K_tiles rows 32"]:
  """Packs codes 0 .. 2^bits - 1 into kernel order; jit-compiled. Larger ones are the caller's mistake.

  Returns:
    int16 words of shape `qweight_shape(K, N, bits)`; the padding holds the code of zero.
  """
  k, n = codes.shape
  k_padded, n_padded = padded_shape(k, n)
  codes = jnp.pad(codes, ((0, k_padded - k), (0, n_padded - n)), constant_values=zero_code(bits))
  if bits == 4:
    return _pack_nibbles(codes)
  return jnp.concatenate([_pack_nibbles(codes >> 4), _pack_nibbles(codes & 15)], axis=2)


@partial(jax.jit, static_argnames=("k", "n"))
def unpack_codes(qweight: Int16[Array, "N_tiles K_tiles rows 32"], k: int, n: int) -> UInt8[Array, "K N"]:
  """The codes of a packed [k, n] weight, 4 or 8 bits by the buffer's shape: the inverse of `pack_codes`; jit-compiled.

  Raises:
    ValueError: the buffer is not that of a [k, n] weight.
  """
  shapes = [qweight_shape(k, n, bits) for bits in (4, 8)]
  if qweight.shape not in shapes:
    raise ValueError(f"{qweight.shape=} is none of the packed shapes {shapes} of a weight with {k=}, {n=}")
  if qweight.shape == shapes[0]:
    return _unpack_nibbles(qweight)[:k, :n]
  high, low = (_unpack_nibbles(half) for half in jnp.split(qweight, 2, axis=2))
  return (high << 4 | low)[:k, :n]


def _pack_nibbles(codes):
  """[K, N], whole tiles -> int16 [N/64, K/64, 32, 32]."""
  k, n = codes.shape
  tiles = codes.astype(jnp.uint16).reshape(k // TILE, 4, 2, 4, 2, n // TILE, 4, 2, 8)
  nibbles = tiles.transpose([_TILE_AXES[axis] for axis in _WORD_AXES]).reshape(n // TILE, k // TILE, 32, 32, 4)
  words = nibbles << jnp.arange(0, 16, 4, dtype=jnp.uint16)
  return jax.lax.bitcast_convert_type(words.sum(-1, dtype=jnp.uint16), jnp.int16)


def _unpack_nibbles(words):
  """int16 [N/64, K/64, 32, 32] -> uint8 [K, N]."""
  n_tiles, k_tiles, _, _ = words.shape
  nibbles = (words[..., None] >> jnp.arange(0, 16, 4, dtype=jnp.int16)).astype(jnp.uint8) & 15
  axes = nibbles.reshape(n_tiles, k_tiles, 4, 8, 4, 4, 2, 2, 2)
  tiles = axes.transpose(np.argsort([_TILE_AXES[axis] for axis in _WORD_AXES]))
  return tiles.reshape(k_tiles * TILE, n_tiles * TILE)
