# SPDX-License-Identifier: Apache-2.0
"""The packed layout of 2:4 sparse weights of 4 bits: half the codes in the dense layout, and where they belong.

Of every four consecutive k of a column, a quad, at most two codes are not 8, the weight zero. Two codes of a quad are
kept, and the positions of both, `first < second`, 2 bits each; where fewer than two are not 8, one or two 8s are kept
with them. 12 bits a quad are 3 bits a weight:

    qweight [N/64, K/128, 32, 32]   the kept codes, a [K/2, N] matrix in the layout of layout.py: rows 2q and 2q + 1 are
                                    the quad of k = 4q .. 4q + 3
    meta    [N/64, K/128, 32, 16]   the positions, nibbles `first | second << 2`, four in an int16 word:

    word (r, c), nibble i  is the quad of   n = 16 (r // 8) + 8 (c % 2) + r % 8
                                            k = 64 (c // 2 % 2) + 16 (c // 4) + 4 i .. + 3

    word       15        12 11         8 7          4 3          0
              | k+12..k+15 |  k+8..k+11 |   k+4..k+7 |   k..k+3   |    second, first in each

Why this order: it is that of sparse tensor cores (PTX ISA, "Sparse matrix storage" of wgmma.mma_async.sp for .f16 and
.bf16; CUTLASS has it as `ELayout_64x32`). wgmma.mma_async.sp.m64nNk32 takes the positions of a 64 x 32 operand from two
of every four neighbouring threads, those that the sparsity selector names: T0 and T1 (selector 0) or T2 and T3 (1). The
first of the two brings k = 0 .. 15, the second 16 .. 31, of rows t % 32 // 4 (low half of its register) and + 8 (high
half) of its warp's sixteen. Words 4t .. 4t+3 of a tile, eight bytes, are two registers of thread t of 128, s = 0 and 1,
and register s serves two instructions, k = 64 s .. + 31 with selector 0 and k = 64 s + 32 .. + 63 with selector 1. The
other operand register of such an instruction holds the two kept values of one quad: k = 4 (t % 4) .. + 3 (+ 16), which
is where the dense layout puts rows 2q and 2q + 1 of the kept codes. The order is the documented one; it has not been
confirmed on hardware yet.

N is padded to a multiple of 64 and K to one of 256, with quads of zeros at positions 0 and 1.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int16, UInt8

from pallas_kernels import layout
from pallas_kernels.layout import TILE, ZERO_CODE

K_TILE = 2 * TILE  # k of the dense weight that a tile of kept codes covers
META_WORDS = 32 * 16  # of a tile
# The legal nibbles: two distinct positions, the smaller one in the low bits.
POSITIONS = tuple(first | second << 2 for second in range(4) for first in range(second))


def _nibble_of(nonzero: int) -> int:
  """The positions that are kept where bit j of `nonzero` says that code j of a quad is not zero: those, filled up."""
  kept = sorted(range(4), key=lambda j: (not nonzero >> j & 1, j))[:2]
  return min(kept) | max(kept) << 2


_NIBBLES = np.array([_nibble_of(nonzero) for nonzero in range(16)], np.uint8)

# The bits of the quad's place in a tile of 32 quads by 64 columns, most significant first:
#   n = 16 warp + 8 odd + lane          (4, 2, 8)
#   quad = 16 s + 4 block + i           (2, 4, 4)
# and of the words: r = 8 warp + lane, c = 4 block + 2 s + odd, nibble i.
_TILE_AXES = dict(k_tile=0, s=1, block=2, i=3, n_tile=4, warp=5, odd=6, lane=7)
_META_AXES = ("n_tile", "k_tile", "warp", "lane", "block", "s", "odd", "i")


def kept_rows(k: int) -> int:
  """Rows of the matrix of kept codes of a weight with k rows: two for every four, or part of four."""
  return 2 * -(-k // 4)


def padded_shape(k: int, n: int) -> tuple[int, int]:
  """(K, N) that the packed buffers of a [k, n] weight cover."""
  kept, n_padded = layout.padded_shape(kept_rows(k), n)
  return 2 * kept, n_padded


def qweight_shape(k: int, n: int) -> tuple[int, int, int, int]:
  """Shape of the kept codes of a [k, n] weight, in int16 words."""
  return layout.qweight_shape(kept_rows(k), n)


def meta_shape(k: int, n: int) -> tuple[int, int, int, int]:
  """Shape of the positions of a [k, n] weight, in int16 words."""
  return *qweight_shape(k, n)[:3], 16


@jax.jit
def surplus(codes: UInt8[Array, "K N"]) -> Bool[Array, "K N"]:
  """Which codes keep the weight from being 2:4: those that are not 8 after two others in their quad; jit-compiled."""
  k, n = codes.shape
  nonzero = _quads(codes) != ZERO_CODE
  return (nonzero & (jnp.cumsum(nonzero, axis=1, dtype=jnp.uint8) > 2)).reshape(-1, n)[:k]


@jax.jit
def pack_codes(
  codes: UInt8[Array, "K N"],
) -> tuple[Int16[Array, "N_tiles K_tiles 32 32"], Int16[Array, "N_tiles K_tiles 32 16"]]:
  """Packs 2:4 sparse codes 0 .. 15 into kernel order; jit-compiled. A third code of a quad would be lost.

  Returns:
    qweight and meta, of shapes `qweight_shape(K, N)` and `meta_shape(K, N)`.
  """
  k, n = codes.shape
  quads = _quads(codes)
  patterns = jnp.sum((quads != ZERO_CODE) << jnp.arange(4, dtype=jnp.uint8)[:, None], axis=1, dtype=jnp.uint8)
  nibbles = jnp.asarray(_NIBBLES)[patterns]
  places = jnp.stack([nibbles & 3, nibbles >> 2], axis=1).astype(jnp.int32)  # [quads, 2, N]
  return layout.pack_codes(jnp.take_along_axis(quads, places, axis=1).reshape(-1, n)), _pack_nibbles(nibbles, k, n)


@partial(jax.jit, static_argnames=("k", "n"))
def unpack_codes(
  qweight: Int16[Array, "N_tiles K_tiles 32 32"], meta: Int16[Array, "_ _ 32 16"], k: int, n: int
) -> UInt8[Array, "K N"]:
  """The codes of a packed [k, n] weight, pruned ones too: the inverse of `pack_codes`; jit-compiled.

  Raises:
    ValueError: the buffers are not those of a [k, n] weight.
  """
  for name, buffer, shape in (("qweight", qweight, qweight_shape(k, n)), ("meta", meta, meta_shape(k, n))):
    if buffer.shape != shape:
      raise ValueError(f"{name}.shape={buffer.shape} is not {shape}, that of a 2:4 sparse weight with {k=}, {n=}")
  kept = layout.unpack_codes(qweight, kept_rows(k), n).reshape(-1, 2, 1, n)
  nibbles = _unpack_nibbles(meta)[: kept_rows(k) // 2, :n]
  return expand(kept[:, 0], kept[:, 1], nibbles[:, None], ZERO_CODE).reshape(-1, n)[:k]


def expand(first: Array, second: Array, nibbles: UInt8[Array, "quads 1 N"], zero) -> Array:
  """[quads, 4, N]: `first` and `second` [quads, 1, N] at the positions that the nibbles say, `zero` elsewhere."""
  places, zero = jnp.arange(4, dtype=jnp.uint8)[:, None], jnp.asarray(zero, first.dtype)
  return jnp.where(places == nibbles & 3, first, jnp.where(places == nibbles >> 2, second, zero))


@jax.jit
def meta_is_sound(meta: Int16[Array, "N_tiles K_tiles 32 16"]) -> Bool[Array, ""]:
  """Whether every nibble is two distinct positions in ascending order; others are undefined on sparse tensor cores."""
  nibbles = _nibbles_of(meta)
  return jnp.all((nibbles & 3) < (nibbles >> 2))


def _quads(codes):
  """[K, N] -> [ceil(K / 4), 4, N]; beyond K there are zeros."""
  k, n = codes.shape
  return jnp.pad(codes, ((0, -k % 4), (0, 0)), constant_values=ZERO_CODE).reshape(-1, 4, n)


def _pack_nibbles(nibbles, k: int, n: int):
  """uint8 [quads, N] -> int16 of `meta_shape(k, n)`."""
  k_padded, n_padded = padded_shape(k, n)
  padding = (0, k_padded // 4 - nibbles.shape[0]), (0, n_padded - n)
  nibbles = jnp.pad(nibbles, padding, constant_values=_NIBBLES[0]).astype(jnp.uint16)
  tiles = nibbles.reshape(k_padded // K_TILE, 2, 4, 4, n_padded // TILE, 4, 2, 8)
  words = tiles.transpose([_TILE_AXES[axis] for axis in _META_AXES]).reshape(*meta_shape(k, n), 4)
  words = (words << jnp.arange(0, 16, 4, dtype=jnp.uint16)).sum(-1, dtype=jnp.uint16)
  return jax.lax.bitcast_convert_type(words, jnp.int16)


def _nibbles_of(meta):
  return (meta[..., None] >> jnp.arange(0, 16, 4, dtype=jnp.int16)).astype(jnp.uint8) & 15


def _unpack_nibbles(meta):
  """int16 [N/64, K/128, 32, 16] -> uint8 [quads, N], padding included."""
  n_tiles, k_tiles, _, _ = meta.shape
  axes = _nibbles_of(meta).reshape(n_tiles, k_tiles, 4, 8, 4, 2, 2, 4)
  return axes.transpose(np.argsort([_TILE_AXES[axis] for axis in _META_AXES])).reshape(-1, n_tiles * TILE)
