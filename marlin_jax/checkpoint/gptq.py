# SPDX-License-Identifier: Apache-2.0
"""GPTQ checkpoints (AutoGPTQ, GPTQModel and what follows them), of 4 or 8 bits.

    <layer>.qweight  int32 [K b/32, N]   32 / b codes along k in a word, the first in the lowest bits; for b = 4:

        bits of word [r, n]   31..28    27..24   ..    7..4     3..0
        code of k =           8r + 7    8r + 6   ..   8r + 1     8r

    <layer>.qzeros   int32 [G, N b/32]   zero points in the same manner, but along n in a word
    <layer>.scales   float [G, N]
    <layer>.g_idx    int32 [K]           the group of each k; may be absent if groups are consecutive

    w[k, n] = scales[g_idx[k], n] * (codes[k, n] - zeros[g_idx[k], n])

With act-order ("desc_act") the groups are scattered along k: rows are sorted by group here, once, and x is gathered in
the same order at run time. Version 2 stores the zero points themselves, version 1 stores them less one: 8 is the field
8 or the field 7. Writers disagree how to store a zero point of 0 in version 1, where the field would be -1:

    GPTQModel    subtracts one from every field of the word at once, so the field borrows from the next one: reading
                 adds 0x11111111 (0x01010101) to the whole word
    AutoGPTQ     and whoever else: reading adds one to each field, modulo 2^b
"""

import re
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32, UInt8

from marlin_jax.checkpoint.folder import CheckpointError
from marlin_jax.checkpoint.layers import (
  QuantizedLayers,
  act_order,
  covered_spec,
  layers_with,
  not_covered,
  on_device,
  read_integers,
  read_scales,
)
from marlin_jax.checkpoint.safetensors_files import Checkpoint
from marlin_jax.checkpoint.words import packed, unpack_words
from marlin_jax.quantized import PackedTensor, QuantSpec
from pallas_kernels.layout import zero_code

# checkpoint_format -> what is added to a stored zero point. gptq_p differs from gptq_v2 in odd numbers of bits only.
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}


@partial(jax.jit, static_argnames=("bits",))
def decode(qweight: Int32[Array, "K_words N"], bits: int = 4) -> UInt8[Array, "K N"]:
  """The codes in `qweight`, 32 / bits along k in a word."""
  return unpack_words(qweight, 0, bits)


def decode_zeros(qzeros: np.ndarray, bits: int, offset: int, *, whole_words: bool) -> np.ndarray:
  """Zero points [G, N] of the fields in int32 [G, N b/32], plus `offset` (0 or 1), in whole words or field by field."""
  if whole_words:
    ones = np.uint32((1 << 32) // (2**bits - 1) * offset)  # a one in every field: 0x11111111, 0x01010101
    return unpack_words((qzeros.view(np.uint32) + ones).view(np.int32), 1, bits)
  return unpack_words(qzeros, 1, bits) + np.uint8(offset) & np.uint8(2**bits - 1)


class GptqLayers(QuantizedLayers):
  """The quantized layers of a GPTQ checkpoint.

  Raises:
    CheckpointError: the quantization_config holds nonsense.
    NotImplementedError: a layer has other than 4 or 8 bits or an odd group size, or the words are not of this format.
  """

  def __init__(self, quantization: dict[str, Any], checkpoint: Checkpoint):
    stored_as = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if stored_as not in _ZERO_OFFSETS:
      raise not_covered(checkpoint, f"GPTQ checkpoint_format is {stored_as!r}, not one of {list(_ZERO_OFFSETS)}")
    if quantization.get("pack_dtype", "int32") != "int32":
      raise not_covered(checkpoint, f"GPTQ pack_dtype is {quantization['pack_dtype']!r}, not 'int32'")
    self._zero_offset = _ZERO_OFFSETS[stored_as]
    self._whole_words = "gptqmodel" in str((quantization.get("meta") or {}).get("quantizer"))
    self._settings = {
      name: _settings_of(name, quantization, checkpoint)
      for name in layers_with(checkpoint, "qweight", "qzeros", "scales", "g_idx")
    }
    super().__init__(
      checkpoint,
      {name: _spec(checkpoint, name, settings) for name, settings in self._settings.items()},
    )

  def shapes(self, name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    groups, per_word = self[name].groups(k), 32 // self[name].bits
    shapes: dict[str, tuple[int, ...]] = {
      "qweight": (k // per_word, n),
      "qzeros": (groups, n // per_word),
      "scales": (groups, n),
    }
    if f"{name}.g_idx" in self.checkpoint or self._settings[name].get("desc_act"):
      shapes["g_idx"] = (k,)
    return {f"{name}.{leaf}": shape for leaf, shape in shapes.items()}

  def read(self, name: str, k: int, n: int, device) -> PackedTensor:
    spec, g_idx = self[name], f"{name}.g_idx"
    zeros = self._read_zeros(name)
    permutation = act_order(self.checkpoint, g_idx, k, spec.groups(k)) if g_idx in self.checkpoint else None
    qweight = read_integers(self.checkpoint, f"{name}.qweight", np.int32)
    scales = read_scales(self.checkpoint, f"{name}.scales", device)
    codes = decode(on_device(qweight, device), spec.bits)
    return packed(codes, scales, zeros, permutation, spec.bits)

  def _read_zeros(self, name: str) -> np.ndarray | None:
    spec, qzeros = self[name], read_integers(self.checkpoint, f"{name}.qzeros", np.int32)
    if spec.symmetric:
      # Some symmetric files are of the other version than they say. Read as they say the zero points would all be 9 or
      # all be 7, which no symmetric quantizer makes.
      fields = unpack_words(qzeros, 1, spec.bits)
      if any((fields == zero_code(spec.bits) - offset).all() for offset in (0, 1)):
        return None
    return decode_zeros(qzeros, spec.bits, self._zero_offset, whole_words=self._whole_words)


def _settings_of(name: str, quantization: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
  """The settings of a layer: the common ones, overridden by the first pattern in "dynamic" that matches its name."""
  try:
    for pattern, override in (quantization.get("dynamic") or {}).items():
      # A pattern that begins with "-:" is of layers that stay float, which need no settings.
      if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
        return quantization | override
  except (AttributeError, TypeError, re.error) as error:
    raise CheckpointError(f"{checkpoint.folder}: quantization_config: dynamic: {error}") from None
  return quantization


def _spec(checkpoint: Checkpoint, name: str, settings: dict[str, Any]) -> QuantSpec:
  group_size = settings.get("group_size")
  symmetric = settings.get("sym", True)
  return covered_spec(checkpoint, name, settings.get("bits"), None if group_size == -1 else group_size, symmetric)
