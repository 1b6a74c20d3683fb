# SPDX-License-Identifier: Apache-2.0
"""HQQ checkpoints as hqq's own `save_to_safetensors` writes them, of 4 or 8 bits and with groups along the inputs.

    <layer>.W_q    uint8 [N G / 2, g]   4 bits; with the R = N G runs of g = K / G inputs, a row of w^T at a time:
                                        row r holds run r in the high nibbles and run R/2 + r in the low ones
                   uint8 [N G, g]       8 bits: row r is run r
    <layer>.scale  float [N G, 1]
    <layer>.zero   float [N G, 1]       not a whole number
    <layer>.nbits, group_size, axis, shape and more: scalars, one tensor each

    w[k, n] = scale[n G + k // g] * (code[k, n] - zero[n G + k // g])

A kernel rounds code - zero to the dtype of x; without a GPU nothing is rounded.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from marlin_jax.checkpoint.folder import CheckpointError
from marlin_jax.checkpoint.layers import (
  QuantizedLayers,
  covered_spec,
  layers_with,
  not_covered,
  read_float,
  read_integers,
  read_scales,
)
from marlin_jax.checkpoint.safetensors_files import Checkpoint
from marlin_jax.checkpoint.words import packed
from marlin_jax.quantized import PackedTensor, QuantSpec

_ARRAYS = ("W_q", "scale", "zero")
# Settings of a layer, each a tensor of its own. What is not named in `_spec` does not say what the weights are.
_SETTINGS = (
  *("nbits", "group_size", "axis", "shape", "view_as_float", "quant_scale", "quant_zero", "packing", "channel_wise"),
  *("compute_dtype", "encoded_state_dict", "offload_meta", "optimize", "round_zero", "stores_quant_config"),
  "unpack_view_dtype",
)


@partial(jax.jit, static_argnames=("bits", "n"))
def decode(
  rows: UInt8[Array, "rows g"], scales: Float[Array, "runs 1"], bits: int, n: int
) -> tuple[UInt8[Array, "K N"], Float[Array, "G N"]]:
  """The codes and scales of a layer with n outputs."""
  if bits == 4:
    rows = jnp.concatenate([rows >> 4, rows & 15])
  return rows.reshape(n, -1).T, scales.reshape(n, -1).T


class HqqLayers(QuantizedLayers):
  """The quantized layers of an HQQ checkpoint; the settings are in its tensors.

  Raises:
    CheckpointError: a setting is missing.
    NotImplementedError: groups run along the outputs, scales are quantized in turn, or other than 4 or 8 bits.
  """

  def __init__(self, checkpoint: Checkpoint):
    super().__init__(checkpoint, {name: _spec(checkpoint, name) for name in layers_with(checkpoint, *_ARRAYS)})

  def shapes(self, name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    groups = self[name].groups(k)
    rows = n * groups
    shapes = {"W_q": (rows * self[name].bits // 8, k // groups), "scale": (rows, 1), "zero": (rows, 1)}
    present = {leaf for leaf in _SETTINGS if f"{name}.{leaf}" in self.checkpoint}
    settings = {f"{name}.{leaf}": self.checkpoint.shape(f"{name}.{leaf}") for leaf in present}
    return {f"{name}.{leaf}": shape for leaf, shape in shapes.items()} | settings

  def read(self, name: str, k: int, n: int, device) -> PackedTensor:
    shape = tuple(map(int, read_integers(self.checkpoint, f"{name}.shape", np.int32, np.int64)))
    if shape != (n, k):
      raise CheckpointError(f"{self.checkpoint.folder}: tensor {name}.shape holds {shape}, must hold {(n, k)}")
    bits, groups = self[name].bits, self[name].groups(k)
    rows = read_integers(self.checkpoint, f"{name}.W_q", np.uint8)
    codes, scales = decode(rows, read_scales(self.checkpoint, f"{name}.scale", device), bits, n)
    zeros = np.asarray(read_float(self.checkpoint, f"{name}.zero", None, device), np.float32).reshape(n, groups).T
    return packed(codes, scales, zeros, None, bits)


def _spec(checkpoint: Checkpoint, name: str) -> QuantSpec:
  def setting(leaf: str, default: Any = None) -> Any:
    tensor = f"{name}.{leaf}"
    if tensor not in checkpoint:
      if default is None:
        raise CheckpointError(f"{checkpoint.folder}: tensor {tensor} is missing")
      return default
    if checkpoint.shape(tensor) != ():
      raise CheckpointError(f"{checkpoint.folder}: tensor {tensor} has shape {checkpoint.shape(tensor)}, must have ()")
    return int(read_integers(checkpoint, tensor, np.uint8, np.int32, np.int64))

  if setting("axis") != 1:
    raise not_covered(checkpoint, f"layer {name} has HQQ groups along the outputs, its axis is {setting('axis')}")
  for leaf in ("view_as_float", "quant_scale", "quant_zero"):
    if setting(leaf, 0):
      raise not_covered(checkpoint, f"layer {name} has the HQQ setting {leaf}")
  return covered_spec(checkpoint, name, setting("nbits"), setting("group_size", 0) or None, False)
