# SPDX-License-Identifier: Apache-2.0
"""GPTQ checkpoints (AutoGPTQ, GPTQModel and what follows them), as far as our codes hold them exactly.

    <layer>.qweight  int32 [K/8, N]   eight codes along k in a word, the first in the lowest bits:

        bits of word [r, n]   31..28    27..24   ..    7..4     3..0
        code of k =           8r + 7    8r + 6   ..   8r + 1     8r

    <layer>.qzeros   int32 [G, N/8]   zero points in the same manner, but eight along n in a word
    <layer>.scales   float [G, N]
    <layer>.g_idx    int32 [K]        the group of each k; may be absent if groups are consecutive

    w[k, n] = scales[g_idx[k], n] * (codes[k, n] - zeros[g_idx[k], n])

Version 2 stores the zero points themselves, version 1 stores them less one: 8 is the field 8 or the field 7. The type
`QuantizedTensor` has no zero points and no act-order: every zero must be 8 and g_idx[k] must be k // group_size.
"""

import re
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from marlin_jax.checkpoint.folder import CheckpointError
from marlin_jax.checkpoint.layers import (
  QuantizedLayers,
  covered_spec,
  layers_with,
  not_covered,
  read_integers,
  read_scales,
)
from marlin_jax.checkpoint.safetensors_files import Checkpoint
from marlin_jax.packing import pack
from marlin_jax.quantized import PackedTensor, QuantizedTensor
from pallas_kernels.layout import ZERO_CODE

# checkpoint_format -> what is added to a stored zero point. gptq_p differs from gptq_v2 in odd numbers of bits only.
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}


def decode(qweight: Int32[Array, "K_words N"], scales: Float[Array, "G N"]) -> QuantizedTensor:
  """The codes in `qweight`, eight along k in a word, with their scales."""
  return QuantizedTensor(codes=unpack_words(qweight, axis=0), scales=scales)


def unpack_words(words, axis: int):
  """uint8 codes of int32 words, eight to a word along `axis`, the first in the lowest bits; for numpy and JAX."""
  shifts = np.arange(0, 32, 4, dtype=np.int32).reshape(8, *(1,) * (words.ndim - 1 - axis))
  fields = words.reshape(*words.shape[: axis + 1], 1, *words.shape[axis + 1 :]) >> shifts & 15
  return fields.astype(np.uint8).reshape(*words.shape[:axis], -1, *words.shape[axis + 1 :])


class GptqLayers(QuantizedLayers):
  """The quantized layers of a GPTQ checkpoint.

  Raises:
    CheckpointError: the quantization_config holds nonsense.
    NotImplementedError: a layer has other than 4 bits or an odd group size, or the words are not of this format.
  """

  def __init__(self, quantization: dict[str, Any], checkpoint: Checkpoint):
    stored_as = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if stored_as not in _ZERO_OFFSETS:
      raise not_covered(checkpoint, f"GPTQ checkpoint_format is {stored_as!r}, not one of {list(_ZERO_OFFSETS)}")
    if quantization.get("pack_dtype", "int32") != "int32":
      raise not_covered(checkpoint, f"GPTQ pack_dtype is {quantization['pack_dtype']!r}, not 'int32'")
    self._zero_offset = _ZERO_OFFSETS[stored_as]
    self._settings = {
      name: _settings_of(name, quantization, checkpoint)
      for name in layers_with(checkpoint, "qweight", "qzeros", "scales", "g_idx")
    }
    super().__init__(
      checkpoint,
      {name: _spec(checkpoint, name, settings) for name, settings in self._settings.items()},
    )

  def shapes(self, name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    groups = self[name].groups(k)
    shapes: dict[str, tuple[int, ...]] = {"qweight": (k // 8, n), "qzeros": (groups, n // 8), "scales": (groups, n)}
    if f"{name}.g_idx" in self.checkpoint or self._settings[name].get("desc_act"):
      shapes["g_idx"] = (k,)
    return {f"{name}.{leaf}": shape for leaf, shape in shapes.items()}

  def read(self, name: str, k: int, n: int, device) -> PackedTensor:
    self._check_zeros(name)
    self._check_groups(name, k)
    qweight = read_integers(self.checkpoint, f"{name}.qweight", np.int32)
    scales = read_scales(self.checkpoint, f"{name}.scales", device)
    return _decode_and_pack(jax.device_put(qweight, device), scales)

  def _check_zeros(self, name: str):
    fields = unpack_words(read_integers(self.checkpoint, f"{name}.qzeros", np.int32), axis=1)
    # Some symmetric files say version 1 and hold the zero points of version 2. Read as version 1 these would all be 9,
    # which no symmetric quantizer makes.
    mislabelled = self._settings[name].get("sym") is True and (fields == ZERO_CODE).all()
    zeros = fields if mislabelled else fields + self._zero_offset & 15
    if (zeros != ZERO_CODE).any():
      other = zeros[zeros != ZERO_CODE][0]
      raise not_covered(self.checkpoint, f"layer {name} is asymmetric, it has a zero point of {other}")

  def _check_groups(self, name: str, k: int):
    tensor = f"{name}.g_idx"
    if tensor not in self.checkpoint:
      return
    g_idx, groups = read_integers(self.checkpoint, tensor, np.int32), self[name].groups(k)
    if g_idx.min() < 0 or g_idx.max() >= groups:
      raise CheckpointError(
        f"{self.checkpoint.folder}: tensor {tensor} has values from {g_idx.min()} to {g_idx.max()}, must be groups "
        f"from 0 to {groups - 1}"
      )
    if (g_idx != np.arange(k) // (k // groups)).any():
      raise not_covered(self.checkpoint, f"layer {name} has act-order, its g_idx is not k // group_size")


@jax.jit
def _decode_and_pack(qweight, scales) -> PackedTensor:
  return pack(decode(qweight, scales))


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


def _spec(checkpoint: Checkpoint, name: str, settings: dict[str, Any]):
  group_size = settings.get("group_size")
  return covered_spec(checkpoint, name, settings.get("bits"), None if group_size == -1 else group_size)
