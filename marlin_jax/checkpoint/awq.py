# SPDX-License-Identifier: Apache-2.0
"""AWQ checkpoints in the packing "gemm" (AutoAWQ and what follows it), of 4 bits.

    <layer>.qweight  int32 [K, N/8]   eight codes along n in a word, in an order of their own:

        bits of word [k, c]   31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
        code of n = 8c +        7       5       3       1       6       4       2       0

    <layer>.qzeros   int32 [G, N/8]   zero points in the same manner
    <layer>.scales   float [G, N]

    w[k, n] = scales[k // group_size, n] * (codes[k, n] - zeros[k // group_size, n])

The tool has scaled the tensors before a quantized layer too (norms, among others): all are taken from this checkpoint.
"""

from typing import Any

import jax
import numpy as np

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

_FIELD = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where in its word column 8c + j lies


def decode(words):
  """[K, N/8] int32 -> [K, N] uint8, for codes and zero points; for numpy and JAX."""
  rows, columns = words.shape
  return unpack_words(words, 1).reshape(rows, columns, 8)[:, :, _FIELD].reshape(rows, 8 * columns)


_decode = jax.jit(decode)


class AwqLayers(QuantizedLayers):
  """The quantized layers of an AWQ checkpoint.

  Raises:
    CheckpointError: the quantization_config holds nonsense.
    NotImplementedError: it is of another packing, of other than 4 bits, or of an odd group size.
  """

  def __init__(self, quantization: dict[str, Any], checkpoint: Checkpoint):
    packing = str(quantization.get("version", "gemm")).lower()
    if packing != "gemm":
      raise not_covered(checkpoint, f"AWQ version is {packing!r}, not 'gemm'")
    bits, group_size = (quantization.get(key, quantization.get(old)) for key, old in _KEYS)
    group_size = None if group_size == -1 else group_size
    if bits == 8:
      raise not_covered(checkpoint, "AWQ of 8 bits has no agreed order of words")
    names = layers_with(checkpoint, "qweight", "qzeros", "scales")
    super().__init__(checkpoint, {name: covered_spec(checkpoint, name, bits, group_size, False) for name in names})

  def shapes(self, name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    groups = self[name].groups(k)
    return {f"{name}.qweight": (k, n // 8), f"{name}.qzeros": (groups, n // 8), f"{name}.scales": (groups, n)}

  def read(self, name: str, k: int, n: int, device) -> PackedTensor:
    qweight, qzeros = (read_integers(self.checkpoint, f"{name}.{leaf}", np.int32) for leaf in ("qweight", "qzeros"))
    scales = read_scales(self.checkpoint, f"{name}.scales", device)
    return packed(_decode(on_device(qweight, device)), scales, decode(qzeros))


_KEYS = (("bits", "w_bit"), ("group_size", "q_group_size"))  # the second names are those of old quant_config.json files
