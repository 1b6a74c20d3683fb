# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors checkpoints (llm-compressor), format pack-quantized, as far as our codes hold them exactly.

    <layer>.weight_packed  int32 [N, K/8]   eight codes along k in a word, the first in the lowest bits:

        bits of word [n, c]   31..28    27..24   ..    7..4     3..0
        code of k =           8c + 7    8c + 6   ..   8c + 1     8c

    <layer>.weight_scale   float [N, G]     strategy "channel" is G = 1
    <layer>.weight_shape   int [2]          (N, K)

    w[k, n] = weight_scale[n, k // group_size] * (codes[k, n] - 8)

The format thinks of signed codes -8..7 stored with 8 added; read as they lie they are ours. Everything is the
transpose of ours. The activation order "static" (or "weight") is one in which the quantizer worked and leaves no trace
in the file; with "group" (or "dynamic") the groups are scattered along k, which `QuantizedTensor` cannot say.
"""

import re
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from marlin_jax.checkpoint.folder import CheckpointError
from marlin_jax.checkpoint.gptq import unpack_words
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
from marlin_jax.quantized import PackedTensor, QuantizedTensor, QuantSpec

_FORMAT = "pack-quantized"


def decode(weight_packed: Int32[Array, "N K_words"], weight_scale: Float[Array, "N G"]) -> QuantizedTensor:
  """The codes in `weight_packed`, eight along k in a word, with their scales; both transposed."""
  return QuantizedTensor(codes=unpack_words(weight_packed, axis=1).T, scales=weight_scale.T)


class CompressedTensorsLayers(QuantizedLayers):
  """The quantized layers of a compressed-tensors checkpoint.

  Raises:
    CheckpointError: the quantization_config holds nonsense.
    NotImplementedError: it asks for more than 4-bit symmetric weights.
  """

  def __init__(self, quantization: dict[str, Any], checkpoint: Checkpoint):
    # Each of these changes what the weights or the activations are.
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
      raise not_covered(checkpoint, f"compressed-tensors sparsity_config has the format {sparsity!r}")
    for key in ("kv_cache_scheme", "transform_config"):
      if quantization.get(key):
        raise not_covered(checkpoint, f"compressed-tensors {key} is {quantization[key]!r}")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
      raise CheckpointError(f"{checkpoint.folder}: quantization_config: config_groups must be an object of objects")
    for group in groups.values():
      # Newer files repeat the format in each group, and only there if the groups differ.
      stored_as = group.get("format") or quantization.get("format")
      if stored_as != _FORMAT:
        raise not_covered(checkpoint, f"compressed-tensors format is {stored_as!r}, not {_FORMAT!r}")
    names = layers_with(checkpoint, "weight_packed", "weight_scale", "weight_shape")
    super().__init__(checkpoint, {name: _spec(checkpoint, name, _group_of(checkpoint, name, groups)) for name in names})

  def shapes(self, name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    shapes = {"weight_packed": (n, k // 8), "weight_scale": (n, self[name].groups(k)), "weight_shape": (2,)}
    return {f"{name}.{leaf}": shape for leaf, shape in shapes.items()}

  def read(self, name: str, k: int, n: int, device) -> PackedTensor:
    shape = read_integers(self.checkpoint, f"{name}.weight_shape", np.int32, np.int64)
    if tuple(shape) != (n, k):
      raise CheckpointError(
        f"{self.checkpoint.folder}: tensor {name}.weight_shape holds {tuple(map(int, shape))}, must hold {(n, k)}"
      )
    weight_packed = read_integers(self.checkpoint, f"{name}.weight_packed", np.int32)
    weight_scale = read_scales(self.checkpoint, f"{name}.weight_scale", device)
    return _decode_and_pack(jax.device_put(weight_packed, device), weight_scale)


@jax.jit
def _decode_and_pack(weight_packed, weight_scale) -> PackedTensor:
  return pack(decode(weight_packed, weight_scale))


def _group_of(checkpoint: Checkpoint, name: str, groups: dict[str, Any]) -> dict[str, Any]:
  """The group that a layer belongs to: by name or pattern if one says so, else by its class, Linear."""

  def matches(target: str) -> bool:
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name

  try:
    for by_class in (False, True):
      for group in groups.values():
        if any(target == "Linear" if by_class else matches(target) for target in group["targets"]):
          return group
  except (KeyError, TypeError, AttributeError, re.error) as error:
    raise CheckpointError(f"{checkpoint.folder}: quantization_config: targets: {error!r}") from None
  raise CheckpointError(f"{checkpoint.folder}: quantization_config: no targets name the quantized layer {name}")


def _spec(checkpoint: Checkpoint, name: str, group: dict[str, Any]) -> QuantSpec:
  for key in ("input_activations", "output_activations"):
    if group.get(key) is not None:
      raise not_covered(checkpoint, f"layer {name} has quantized {key.replace('_', ' ')}")
  weights = group.get("weights")
  if not isinstance(weights, dict):
    raise CheckpointError(f"{checkpoint.folder}: quantization_config: weights is {weights!r}, must be an object")
  if weights.get("type", "int") != "int":
    raise not_covered(checkpoint, f"layer {name} has codes of type {weights['type']!r}")
  if weights.get("symmetric") is not True:
    raise not_covered(checkpoint, f"layer {name} is asymmetric")
  if weights.get("actorder") not in (None, False, "weight", "static"):
    raise not_covered(checkpoint, f"layer {name} has act-order, its actorder is {weights['actorder']!r}")
  if weights.get("strategy") not in ("group", "channel"):
    raise not_covered(checkpoint, f"layer {name} has the strategy {weights.get('strategy')!r}")
  group_size = weights.get("group_size") if weights["strategy"] == "group" else None
  if weights["strategy"] == "group" and group_size is None:
    raise CheckpointError(f"{checkpoint.folder}: quantization_config: group_size is missing for the strategy 'group'")
  return covered_spec(checkpoint, name, weights.get("num_bits"), group_size)
