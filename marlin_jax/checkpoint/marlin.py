# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the order of the original MARLIN kernel (IST-DASLab/marlin; Frantar et al., arXiv 2408.11743).

    <layer>.B  int32 [K/16, 2 N]    w[k, n] = scales[k // group_size, n] * (codes[k, n] - 8)
    <layer>.s  float16 [G, N]

A row of B is N/64 runs of 128 words, and a run is a block of 16 (k) x 64 (n) codes, in the order in which the 32
threads of a warp load the fragments of mma.m16n8k16. The indices of a run, slowest first, with their sizes:

    word in the run     column 8 | pair 4 | tile 4            (a thread is 4 column + pair, and has four words)
    code in the word    odd 2 | right 2 | lower 2

    bits     31..28    27..24    23..20    19..16    15..12     11..8      7..4      3..0
    odd        1         1         1         1         0         0          0         0
    right      1         1         0         0         1         1          0         0
    lower      1         0         1         0         1         0          1         0

    k in the block = 8 lower + 2 pair + odd
    n in the block = 16 tile + 8 right + column

Every index is a bit field, so decoding is a reshape and a transpose. Scales lie in the order in which a thread needs
them: 8 x 8 blocks of columns transposed, or, with one group a column, pairs of columns in runs of 32:

    G > 1    s[8 i + j]        is the scale of column  8 j + i          of each 64    (i < 8, j < 8)
    G = 1    s[8 i + 2 a + b]  is the scale of column  8 a + 2 i + b    of each 32    (i < 4, a < 4, b < 2)
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from marlin_jax.checkpoint.folder import CheckpointError
from marlin_jax.checkpoint.layers import (
  QuantizedLayers,
  covered_spec,
  layers_with,
  not_covered,
  on_device,
  read_integers,
  read_scales,
)
from marlin_jax.checkpoint.safetensors_files import Checkpoint
from marlin_jax.checkpoint.words import packed, unpack_words
from marlin_jax.quantized import PackedTensor

_GROUP_SIZES = (128, None)
_K_MULTIPLE, _N_MULTIPLE = 128, 256


@jax.jit
def decode(
  B: Int32[Array, "K_blocks N_words"], s: Float[Array, "G N"]
) -> tuple[UInt8[Array, "K N"], Float[Array, "G N"]]:
  """The codes and scales in natural order."""
  rows, (groups, n) = B.shape[0], s.shape
  fields = unpack_words(B, axis=1).reshape(rows, n // 64, 8, 4, 4, 2, 2, 2)
  # From (row, block, column, pair, tile, odd, right, lower) to k = (row, lower, pair, odd), n = (block, tile, ...).
  codes = fields.transpose(0, 7, 3, 5, 1, 4, 6, 2).reshape(16 * rows, n)
  if groups > 1:
    scales = s.reshape(groups, n // 64, 8, 8).transpose(0, 1, 3, 2)
  else:
    scales = s.reshape(1, n // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4)
  return codes, scales.reshape(groups, n)


class MarlinLayers(QuantizedLayers):
  """The quantized layers of a checkpoint in the original MARLIN format.

  Raises:
    CheckpointError: the quantization_config holds nonsense.
    NotImplementedError: a layer has other than 4 bits, or a group size that the format does not have.
  """

  def __init__(self, quantization: dict[str, Any], checkpoint: Checkpoint):
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    group_size = None if group_size == -1 else group_size
    if bits == 8:
      raise not_covered(checkpoint, "the MARLIN format has 4 bits, not 8")
    specs = {name: covered_spec(checkpoint, name, bits, group_size, True) for name in layers_with(checkpoint, "B", "s")}
    if specs and group_size not in _GROUP_SIZES:
      raise not_covered(checkpoint, f"the MARLIN format has groups of 128 or whole columns, not of {group_size}")
    super().__init__(checkpoint, specs)

  def shapes(self, name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    if k % _K_MULTIPLE or n % _N_MULTIPLE:
      raise CheckpointError(
        f"{self.checkpoint.folder}: layer {name} has K={k} and N={n}, in the MARLIN format they must be multiples of "
        f"{_K_MULTIPLE} and {_N_MULTIPLE}"
      )
    return {f"{name}.B": (k // 16, 2 * n), f"{name}.s": (self[name].groups(k), n)}

  def read(self, name: str, k: int, n: int, device) -> PackedTensor:
    words = read_integers(self.checkpoint, f"{name}.B", np.int32)
    return packed(*decode(on_device(words, device), read_scales(self.checkpoint, f"{name}.s", device)))
