# SPDX-License-Identifier: Apache-2.0
"""Layers that read the same input become one: fewer and larger products for the same weights."""

import threading
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from marlin_jax.models.decoder import Decoder
from marlin_jax.models.layers import DecoderLayer
from marlin_jax.models.mlp import MLP, MoE
from marlin_jax.models.swiglu import QuantSwiGLU
from marlin_jax.nnx import QuantLinear
from marlin_jax.packing import concatenate, split

_QKV, _QKV_PARTS = "qkv_proj", ("q_proj", "k_proj", "v_proj")
_GATE_UP, _GATE_UP_PARTS = "gate_up_proj", ("gate_proj", "up_proj")
# Threads that begin to generate with one model at the same time all fuse it: the first does, the others wait.
_FUSING = threading.Lock()


def fuse(model: Decoder) -> Decoder:
  """Makes one layer of the query, key and value projections and one of gate and up, in place, for inference.

  Float or quantized, the columns stay the same; those of a quantized gate and up are interleaved, and the layer gates
  its result itself. Where the parts cannot stand in one matrix (they differ in bits, group size, zero points or
  act-order, or are not all quantized) they stay apart. `unfuse` takes it back. Several threads may call it at once.

  Returns:
    The model.
  """
  with _FUSING:
    for layer in model.layers:
      _fuse(layer.attention, _QKV, _QKV_PARTS)
      mlp = _mlp(layer)
      _fuse_swiglu(mlp)
      _fuse(mlp, _GATE_UP, _GATE_UP_PARTS)
  return model


def unfuse(model: Decoder) -> Decoder:
  """Makes the layers of the checkpoint again of those that `fuse` made, in place, with the same columns.

  Returns:
    The model.
  """
  config = model.config
  kv_features = config.num_kv_heads * config.head_dim
  for layer in model.layers:
    _unfuse(layer.attention, _QKV, _QKV_PARTS, (config.num_heads * config.head_dim, kv_features, kv_features))
    mlp = _mlp(layer)
    if hasattr(mlp, "swiglu"):
      mlp.gate_proj, mlp.up_proj = mlp.swiglu.apart()
      del mlp.swiglu
    _unfuse(mlp, _GATE_UP, _GATE_UP_PARTS, (mlp.down_proj.in_features,) * 2)
  return model


def _mlp(layer: DecoderLayer) -> MLP:
  """The MLP of a layer; of a mixture, the stack of its experts."""
  return layer.mlp.experts if isinstance(layer.mlp, MoE) else layer.mlp


def _fuse_swiglu(mlp: MLP) -> None:
  """One layer of gate and up that gates its result, where they are quantized alike and eights divide their width."""
  parts = [getattr(mlp, part, None) for part in _GATE_UP_PARTS]
  if not all(isinstance(part, QuantLinear) for part in parts):
    return
  try:
    swiglu = QuantSwiGLU.of(*parts)
  except ValueError:
    return
  for part in _GATE_UP_PARTS:
    delattr(mlp, part)
  mlp.swiglu = swiglu


def _fuse(parent: nnx.Module, name: str, parts: Sequence[str]) -> None:
  if not all(hasattr(parent, part) for part in parts):
    return
  layer = _side_by_side([getattr(parent, part) for part in parts])
  if layer is not None:
    for part in parts:
      delattr(parent, part)
    setattr(parent, name, layer)


def _unfuse(parent: nnx.Module, name: str, parts: Sequence[str], sizes: Sequence[int]) -> None:
  if not hasattr(parent, name):
    return
  layer = getattr(parent, name)
  starts = np.cumsum(sizes)[:-1]
  biases = [None] * len(sizes) if layer.bias is None else jnp.split(layer.bias[...], starts, axis=-1)
  if isinstance(layer, QuantLinear):
    packed = split(layer.packed, sizes)
    layers = [
      QuantLinear.from_packed(weight, None if bias is None else nnx.Param(bias), dtype=layer.dtype)
      for weight, bias in zip(packed, biases, strict=True)
    ]
  else:
    kernels = jnp.split(layer.kernel[...], starts, axis=-1)
    layers = [_linear(kernel, bias, layer.dtype) for kernel, bias in zip(kernels, biases, strict=True)]
  delattr(parent, name)
  for part, apart in zip(parts, layers, strict=True):
    setattr(parent, part, apart)


def _side_by_side(layers: Sequence[Any]) -> nnx.Linear | QuantLinear | None:
  """One layer whose outputs are those of the layers, one after the other; None where they do not fit together."""
  first = layers[0]
  if len({(type(layer), layer.dtype, layer.bias is None) for layer in layers}) > 1:
    return None
  bias = None if first.bias is None else jnp.concatenate([layer.bias[...] for layer in layers], axis=-1)
  if isinstance(first, QuantLinear):
    try:
      packed = concatenate([layer.packed for layer in layers])
    except ValueError:
      return None
    return QuantLinear.from_packed(packed, None if bias is None else nnx.Param(bias), dtype=first.dtype)
  return _linear(jnp.concatenate([layer.kernel[...] for layer in layers], axis=-1), bias, first.dtype)


def _linear(kernel: Array, bias: Array | None, dtype) -> nnx.Linear:
  layer = nnx.eval_shape(
    lambda: nnx.Linear(
      *kernel.shape[-2:], use_bias=bias is not None, dtype=dtype, param_dtype=kernel.dtype, rngs=nnx.Rngs(0)
    )
  )
  layer.kernel = nnx.Param(kernel)
  if bias is not None:
    layer.bias = nnx.Param(bias)
  return layer
