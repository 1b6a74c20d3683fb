# SPDX-License-Identifier: Apache-2.0
"""What stands between two products of a decoder layer: residual and norm, left to the products that are quantized."""

from typing import Any, TypeGuard

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from marlin_jax.nnx import QuantLinear
from marlin_jax.ops import quant_after_attention
from pallas_kernels import DeferredNorm, resolved
from pallas_kernels.add_norm import add_norm as add_norm_kernel


def onto(
  layer: Any,
  x: Float[Array, "B T K"],
  residual: Float[Array, "B T E"],
  norm: nnx.RMSNorm | None,
  *,
  fused: bool,
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"] | DeferredNorm | None]:
  """(s, norm(s)) with s = residual + layer(x); without a norm (s, None).

  A quantized layer does all of it, and may leave the division to the layer that reads it. Otherwise `fused` takes one
  kernel for all but the product, on a GPU.
  """
  if isinstance(layer, QuantLinear):
    return layer(x, residual=residual, norm=norm) if norm is not None else (layer(x, residual=residual), None)
  return add_norm(residual, layer(x), norm, fused=fused)


Layers = tuple[QuantLinear, QuantLinear, QuantLinear, QuantLinear]


def between_attentions(layers: tuple[Any, ...], dtype: DTypeLike) -> TypeGuard[Layers]:
  """Whether `after_attention` takes these layers: quantized, with no bias but the last one's, without permutations."""
  return all(
    isinstance(layer, QuantLinear)
    and layer.permutation is None
    and layer.dtype in (None, dtype)
    and (layer.bias is None or layer is layers[-1])
    for layer in layers
  )


def after_attention(
  layers: Layers,
  x: Float[Array, "B T K"],
  residual: Float[Array, "B T E"],
  norms: tuple[nnx.RMSNorm, nnx.RMSNorm],
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"] | DeferredNorm, Float[Array, "B T N"]]:
  """(s, norm(s), reader(norm(s))) with s = t + down(swiglu(norm(t))) and t = residual + output(x).

  In one kernel where there is one for it.

  Args:
    layers: output, swiglu, down and reader, of `between_attentions`.
    norms: of t and of s.
  """
  weights = tuple(layer.packed for layer in layers)
  bias = None if layers[-1].bias is None else layers[-1].bias[...]
  return quant_after_attention(x, residual, weights, tuple((norm.scale[...], norm.epsilon) for norm in norms), bias)


def add_norm(
  x: Float[Array, "B T E"], delta: Float[Array, "B T E"], norm: nnx.RMSNorm | None, *, fused: bool
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"] | None]:
  """(s, norm(s)) with s = x + delta; without a norm (s, None). `fused` takes one kernel for it, on a GPU."""
  if norm is None or not fused:
    total = x + delta
    return total, None if norm is None else norm(total)
  rows = (array.reshape(-1, x.shape[-1]) for array in (x, delta))
  total, y = add_norm_kernel(*rows, norm.scale[...], epsilon=norm.epsilon)
  return total.reshape(x.shape), y.reshape(x.shape)


def read(layer: Any, x: Float[Array, "*B K"] | DeferredNorm) -> Float[Array, "*B N"]:
  """layer(x); a layer that is not quantized gets an array."""
  return layer(x if isinstance(layer, QuantLinear) else resolved(x))
