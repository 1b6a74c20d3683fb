# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors checkpoints of format marlin-24 (releases up to 0.14): 2:4 sparse codes of 4 or 8 bits.

    <layer>.weight_packed  int32 [K/32, N b/2]   the kept codes, two of every four along k, plus 2^(b-1)
    <layer>.meta           int16 [K/32, 2 N]     where in their quad they belong: nibbles first | second << 2
    <layer>.scale_packed   float16 [G, N]

The order is that of the Sparse-MARLIN kernel (IST-DASLab/Sparse-Marlin): every index is a bit field, so decoding is a
reshape and a transpose. A row of weight_packed is N/64 runs of 16 kept rows x 64 columns; slowest first, with sizes:

    4 bits    word: tile 4 | upper 2 | pair 4 | column 4               code: odd 2 | block 2 | lower 2
    8 bits    word: tile 4 | upper 2 | pair 4 | column 4 | block 2     code: odd 2 | lower 2

    kept row = 8 lower + 2 pair + odd      n = 16 tile + 8 upper + 4 block + column

A row of meta is N/64 runs of 32 k x 64 columns, a word the four quads of 16 k (the reordering of CUTLASS 2 for
mma.sp.m16n8k32):

    word: b1 2 | b543 8 | b0 2 | half 2 | b2 2      n = 8 b543 + 4 b2 + 2 b1 + b0      k = 16 half + 4 nibble

Scales lie in natural order, or, in groups of less than K/2, with each eight columns n = 4 b + a stored at 2 a + b. (The
packer compares the group size with the number of kept rows, so one of K = 256 in groups of 128 has natural order.)

4 bits stay 2:4 sparse here; 8 bits become a dense weight with its zeros, which holds the same values.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from marlin_jax.checkpoint.compressed_tensors import specs_of
from marlin_jax.checkpoint.folder import CheckpointError
from marlin_jax.checkpoint.layers import QuantizedLayers, not_covered, read_integers, read_scales
from marlin_jax.checkpoint.safetensors_files import Checkpoint
from marlin_jax.checkpoint.words import packed, unpack_words
from marlin_jax.packing import pack24
from marlin_jax.quantized import Packed, QuantizedTensor
from pallas_kernels import layout24
from pallas_kernels.layout import zero_code

FORMAT = "marlin-24"
_GROUP_SIZES = (128, None)
_K_MULTIPLE, _N_MULTIPLE = 32, 64


def decode_meta(meta: np.ndarray) -> np.ndarray:
  """uint8 [K/4, N], the nibble of every quad, of int16 [K/32, 2 N]."""
  rows, n = meta.shape[0], meta.shape[1] // 2
  nibbles = (meta.view(np.uint16)[..., None] >> np.arange(0, 16, 4, dtype=np.uint16)).astype(np.uint8) & 15
  fields = nibbles.reshape(rows, n // 64, 2, 8, 2, 2, 2, 4)
  # From (row, run, b1, b543, b0, half, b2, nibble) to quad = (row, half, nibble), n = (run, b543, b2, b1, b0).
  return fields.transpose(0, 5, 7, 1, 3, 6, 2, 4).reshape(8 * rows, n)


@partial(jax.jit, static_argnames=("bits",))
def decode(
  weight_packed: Int32[Array, "K_blocks N_words"],
  nibbles: UInt8[Array, "quads N"],
  scale_packed: Float[Array, "G N"],
  bits: int = 4,
) -> tuple[UInt8[Array, "K N"], Float[Array, "G N"]]:
  """The codes, pruned ones too, and scales in natural order."""
  rows, (groups, n) = weight_packed.shape[0], scale_packed.shape
  kept = unpack_words(weight_packed, 1, bits)
  if bits == 4:  # (row, run, tile, upper, pair, column, odd, block, lower)
    kept = kept.reshape(rows, n // 64, 4, 2, 4, 4, 2, 2, 2).transpose(0, 8, 4, 6, 1, 2, 3, 7, 5)
  else:  # (row, run, tile, upper, pair, column, block, odd, lower)
    kept = kept.reshape(rows, n // 64, 4, 2, 4, 4, 2, 2, 2).transpose(0, 8, 4, 7, 1, 2, 3, 6, 5)
  kept = kept.reshape(-1, 2, 1, n)
  codes = layout24.expand(kept[:, 0], kept[:, 1], nibbles[:, None], zero_code(bits)).reshape(32 * rows, n)
  if groups > 2:  # a group is less than half of K
    scale_packed = scale_packed.reshape(groups, n // 8, 4, 2).transpose(0, 1, 3, 2).reshape(groups, n)
  return codes, scale_packed


class Marlin24Layers(QuantizedLayers):
  """The quantized layers of a marlin-24 checkpoint.

  Raises:
    CheckpointError: the quantization_config holds nonsense.
    NotImplementedError: a layer has other than 4 or 8 bits, zero points, or a group size that the format does not have.
  """

  def __init__(self, quantization: dict[str, Any], checkpoint: Checkpoint):
    specs = specs_of(quantization, checkpoint, "weight_packed", "scale_packed", "meta")
    for name, spec in specs.items():
      if not spec.symmetric:
        raise not_covered(checkpoint, f"layer {name} has zero points, which the {FORMAT} format does not have")
      if spec.group_size not in _GROUP_SIZES:
        raise not_covered(
          checkpoint, f"layer {name}: the {FORMAT} format has groups of 128 or whole columns, not of {spec.group_size}"
        )
    super().__init__(
      checkpoint, {name: dataclasses.replace(spec, sparse24=spec.bits == 4) for name, spec in specs.items()}
    )

  def shapes(self, name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    if k % _K_MULTIPLE or n % _N_MULTIPLE:
      raise CheckpointError(
        f"{self.checkpoint.folder}: layer {name} has K={k} and N={n}, in the {FORMAT} format they must be multiples of "
        f"{_K_MULTIPLE} and {_N_MULTIPLE}"
      )
    spec = self[name]
    return {
      f"{name}.weight_packed": (k // 32, n * spec.bits // 2),
      f"{name}.meta": (k // 32, 2 * n),
      f"{name}.scale_packed": (spec.groups(k), n),
    }

  def read(self, name: str, k: int, n: int, device) -> Packed:
    bits = self[name].bits
    nibbles = decode_meta(read_integers(self.checkpoint, f"{name}.meta", np.int16))
    wrong = (nibbles & 3) >= (nibbles >> 2)
    if wrong.any():
      quad, column = np.unravel_index(np.argmax(wrong), wrong.shape)
      first, second = nibbles[quad, column] & 3, nibbles[quad, column] >> 2
      raise CheckpointError(
        f"{self.checkpoint.folder}: tensor {name}.meta has positions {first} and {second} for "
        f"k={4 * quad}..{4 * quad + 3}, n={column}, must have two ascending ones"
      )
    words = read_integers(self.checkpoint, f"{name}.weight_packed", np.int32)
    scales = read_scales(self.checkpoint, f"{name}.scale_packed", device)
    codes, scales = decode(words, nibbles, scales, bits=bits)
    if bits == 8:
      return packed(codes, scales, bits=bits)
    # In a trace pack24 does not look whether the codes are 2:4; their positions say so.
    return jax.jit(pack24)(QuantizedTensor(codes=codes, scales=scales))
