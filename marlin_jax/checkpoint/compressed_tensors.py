# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors checkpoints (llm-compressor), format pack-quantized, of 4 or 8 bits.

    <layer>.weight_packed      int32 [N, K b/32]   32 / b codes along k in a word, the first in the lowest bits; b = 4:

        bits of word [n, c]   31..28    27..24   ..    7..4     3..0
        code of k =           8c + 7    8c + 6   ..   8c + 1     8c

    <layer>.weight_scale       float [N, G]        strategy "channel" is G = 1
    <layer>.weight_zero_point  int32 [N b/32, G]   asymmetric only: packed in the same manner, but along n
    <layer>.weight_shape       int [2]             (N, K)
    <layer>.weight_g_idx       int32 [K]           actorder "group" only: the group of each k

    w[k, n] = weight_scale[n, g] * (codes[k, n] - zeros[n, g])    with g = k // group_size or weight_g_idx[k]

The format thinks of signed codes and zero points stored with 2^(b-1) added; read as they lie they are ours. Up to
release 0.9.3 zero points were written as they are, int8 [N, G]. Everything is the transpose of ours. The activation
order "static" (or "weight") is one in which the quantizer worked and leaves no trace in the file; with "group" (or
"dynamic") the groups are scattered along k: rows are sorted by group here, and x is gathered at run time.
"""

import re
from collections.abc import Mapping, Sequence
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
from marlin_jax.checkpoint.words import pack_words, packed, unpack_words
from marlin_jax.quantized import PackedTensor, QuantizedTensor, QuantSpec
from pallas_kernels.layout import zero_code

_FORMAT = "pack-quantized"
_GROUPED = ("group", "dynamic")  # values of actorder that leave groups scattered along k


@partial(jax.jit, static_argnames=("bits",))
def decode(weight_packed: Int32[Array, "N K_words"], bits: int = 4) -> UInt8[Array, "K N"]:
  """The codes in `weight_packed`, 32 / bits along k in a word; transposed."""
  return unpack_words(weight_packed, 1, bits).T


def encode(tensor: QuantizedTensor) -> dict[str, np.ndarray]:
  """Last name -> tensor of a weight in this format; the opposite of what `CompressedTensorsLayers.read` does.

  Raises:
    ValueError: a zero point is no whole number, or K or N does not fill words.
  """
  bits, (k, n) = tensor.bits, tensor.shape
  per_word = 32 // bits
  codes, scales = np.asarray(tensor.codes), np.asarray(tensor.scales)
  if k % per_word:
    raise ValueError(f"K={k} must be a multiple of {per_word} in the compressed-tensors format")
  tensors = {}
  if tensor.permutation is not None:
    permutation = np.asarray(tensor.permutation)
    codes = codes[np.argsort(permutation)]
    tensors["weight_g_idx"] = np.empty(k, np.int32)
    tensors["weight_g_idx"][permutation] = np.arange(k) // tensor.group_size
  if tensor.zeros is not None:
    zeros = np.asarray(tensor.zeros, np.float32)
    if (zeros != np.round(zeros)).any() or zeros.min() < 0 or zeros.max() >= 2**bits:
      raise ValueError(f"zero points must be whole numbers from 0 to {2**bits - 1} in the compressed-tensors format")
    if n % per_word:
      raise ValueError(f"N={n} must be a multiple of {per_word} in the compressed-tensors format with zero points")
    tensors["weight_zero_point"] = pack_words(zeros.T.astype(np.uint8), 0, bits)
  return tensors | {
    "weight_packed": pack_words(codes.T, 1, bits),
    "weight_scale": scales.T,
    "weight_shape": np.array([n, k], np.int64),
  }


def quantization_config(layers: Mapping[str, tuple[QuantSpec, bool]], ignore: Sequence[str]) -> dict[str, Any]:
  """The quantization_config of a checkpoint in this format.

  Args:
    layers: Hugging Face name -> its spec, and whether it has act-order.
    ignore: names of the dense layers that are not quantized.
  """
  kinds: dict[tuple[QuantSpec, bool], list[str]] = {}
  for name, kind in layers.items():
    kinds.setdefault(kind, []).append(name)
  groups = {}
  for i, ((spec, grouped), names) in enumerate(kinds.items()):
    weights = {
      "num_bits": spec.bits,
      "type": "int",
      "symmetric": spec.symmetric,
      "strategy": "channel" if spec.group_size is None else "group",
      "group_size": spec.group_size,
      "actorder": "group" if grouped else None,
      "block_structure": None,
      "dynamic": False,
      "observer": "minmax",
      "observer_kwargs": {},
    }
    activations = {"input_activations": None, "output_activations": None}
    groups[f"group_{i}"] = {
      "targets": ["Linear"] if len(kinds) == 1 else names,
      "format": _FORMAT,
      "weights": weights,
      **activations,
    }
  return {
    "quant_method": "compressed-tensors",
    "format": _FORMAT,
    "quantization_status": "compressed",
    "config_groups": groups,
    "ignore": list(ignore),
    "kv_cache_scheme": None,
    "global_compression_ratio": None,
  }


class CompressedTensorsLayers(QuantizedLayers):
  """The quantized layers of a compressed-tensors checkpoint.

  Raises:
    CheckpointError: the quantization_config holds nonsense.
    NotImplementedError: it asks for more than integer weights of 4 or 8 bits in groups or columns.
  """

  def __init__(self, quantization: dict[str, Any], checkpoint: Checkpoint):
    groups = _groups(quantization, checkpoint)
    for group in groups.values():
      # Newer files repeat the format in each group, and only there if the groups differ.
      stored_as = group.get("format") or quantization.get("format")
      if stored_as != _FORMAT:
        raise not_covered(checkpoint, f"compressed-tensors format is {stored_as!r}, not {_FORMAT!r}")
    leaves = ("weight_packed", "weight_scale", "weight_shape")
    super().__init__(checkpoint, specs_of(quantization, checkpoint, *leaves))
    group_of = {name: _group_of(checkpoint, name, groups) for name in self}
    self._act_order = {name for name, group in group_of.items() if group["weights"].get("actorder") in _GROUPED}

  def shapes(self, name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    spec = self[name]
    groups, per_word = spec.groups(k), 32 // spec.bits
    shapes: dict[str, tuple[int, ...]] = {
      "weight_packed": (n, k // per_word),
      "weight_scale": (n, groups),
      "weight_shape": (2,),
    }
    if not spec.symmetric:
      tensor = f"{name}.weight_zero_point"
      unpacked = tensor in self.checkpoint and self.checkpoint.shape(tensor) == (n, groups)
      shapes["weight_zero_point"] = (n, groups) if unpacked else (n // per_word, groups)
    if name in self._act_order:
      shapes["weight_g_idx"] = (k,)
    return {f"{name}.{leaf}": shape for leaf, shape in shapes.items()}

  def read(self, name: str, k: int, n: int, device) -> PackedTensor:
    shape = read_integers(self.checkpoint, f"{name}.weight_shape", np.int32, np.int64)
    if tuple(shape) != (n, k):
      raise CheckpointError(
        f"{self.checkpoint.folder}: tensor {name}.weight_shape holds {tuple(map(int, shape))}, must hold {(n, k)}"
      )
    spec, g_idx = self[name], f"{name}.weight_g_idx"
    groups = spec.groups(k)
    permutation = act_order(self.checkpoint, g_idx, k, groups) if name in self._act_order else None
    weight_packed = read_integers(self.checkpoint, f"{name}.weight_packed", np.int32)
    scales = read_scales(self.checkpoint, f"{name}.weight_scale", device, transpose=True)
    zeros = None if spec.symmetric else self._read_zeros(name, n, groups).T
    return packed(decode(on_device(weight_packed, device), spec.bits), scales, zeros, permutation, spec.bits)

  def _read_zeros(self, name: str, n: int, groups: int) -> np.ndarray:
    tensor, bits = f"{name}.weight_zero_point", self[name].bits
    if self.checkpoint.shape(tensor) == (n, groups):
      return read_integers(self.checkpoint, tensor, np.int8).astype(np.int32) + zero_code(bits)
    return unpack_words(read_integers(self.checkpoint, tensor, np.int32), 0, bits)


def specs_of(quantization: dict[str, Any], checkpoint: Checkpoint, *leaves: str) -> dict[str, QuantSpec]:
  """Name -> QuantSpec of the layers that have a tensor by one of these last names, from config_groups.

  Raises:
    CheckpointError: the quantization_config holds nonsense.
    NotImplementedError: it asks for more than integer weights of 4 or 8 bits in groups or columns.
  """
  groups = _groups(quantization, checkpoint)
  names = layers_with(checkpoint, *leaves)
  return {name: _spec(checkpoint, name, _group_of(checkpoint, name, groups)) for name in names}


def _groups(quantization: dict[str, Any], checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
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
  return groups


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
  if weights.get("actorder") not in (None, False, "weight", "static", *_GROUPED):
    raise not_covered(checkpoint, f"layer {name} has the actorder {weights['actorder']!r}")
  if weights.get("strategy") not in ("group", "channel"):
    raise not_covered(checkpoint, f"layer {name} has the strategy {weights.get('strategy')!r}")
  group_size = weights.get("group_size") if weights["strategy"] == "group" else None
  if weights["strategy"] == "group" and group_size is None:
    raise CheckpointError(f"{checkpoint.folder}: quantization_config: group_size is missing for the strategy 'group'")
  return covered_spec(checkpoint, name, weights.get("num_bits"), group_size, weights.get("symmetric", True))
