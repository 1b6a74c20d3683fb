# SPDX-License-Identifier: Apache-2.0
"""Layers that read the same input become one: fewer and larger products for the same weights."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from marlin_jax.models.decoder import Decoder
from marlin_jax.nnx import QuantLinear
from marlin_jax.packing import concatenate


def fuse(model: Decoder) -> Decoder:
  """Makes one layer of the query, key and value projections and one of gate and up, in place, for inference.

  Float or quantized, the columns stay the same. Where the parts cannot stand in one matrix (they differ in bits, group
  size or act-order, or are not all quantized) they stay apart. A fused model has no checkpoint names any more.

  Returns:
    The model.
  """
  for layer in model.layers:
    _fuse(layer.attention, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
    _fuse(layer.mlp, "gate_up_proj", ("gate_proj", "up_proj"))
  return model


def _fuse(parent: nnx.Module, name: str, parts: Sequence[str]) -> None:
  if hasattr(parent, name):
    return
  layer = _side_by_side([getattr(parent, part) for part in parts])
  if layer is not None:
    for part in parts:
      delattr(parent, part)
    setattr(parent, name, layer)


def _side_by_side(layers: Sequence[Any]) -> nnx.Linear | QuantLinear | None:
  """One layer whose outputs are those of the layers, one after the other; None where they do not fit together."""
  first = layers[0]
  if len({(type(layer), layer.dtype, layer.bias is None) for layer in layers}) > 1:
    return None
  bias = None if first.bias is None else jnp.concatenate([layer.bias[...] for layer in layers])
  if isinstance(first, QuantLinear):
    try:
      packed = concatenate([layer.packed for layer in layers])
    except ValueError:
      return None
    return QuantLinear.from_packed(packed, None if bias is None else nnx.Param(bias), dtype=first.dtype)
  kernel = jnp.concatenate([layer.kernel[...] for layer in layers], axis=1)

  def held(array: Array | None):
    return lambda *_: array

  return nnx.Linear(
    *kernel.shape,
    use_bias=bias is not None,
    dtype=first.dtype,
    param_dtype=first.param_dtype,
    kernel_init=held(kernel),
    bias_init=held(bias),
    rngs=nnx.Rngs(0),
  )
