# SPDX-License-Identifier: Apache-2.0
"""What stands between two products of a decoder layer, left to the products where they are quantized."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from marlin_jax.nnx import QuantLinear
from pallas_kernels.add_norm import add_norm as add_norm_kernel
from pallas_kernels.add_norm import rms_norm


def add_norm(
  norm: nnx.RMSNorm, x: Float[Array, "B T E"], delta: Float[Array, "B T E"] | None, *, fused: bool
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"]]:
  """(s, norm(s)) with s = x + delta, or s = x without a delta; `fused` takes one kernel for it, on a GPU."""
  if not fused:
    x = x if delta is None else x + delta
    return x, norm(x)
  rows = x.reshape(-1, x.shape[-1])
  if delta is None:
    return x, rms_norm(rows, norm.scale[...], epsilon=norm.epsilon).reshape(x.shape)
  total, y = add_norm_kernel(rows, delta.reshape(rows.shape), norm.scale[...], epsilon=norm.epsilon)
  return total.reshape(x.shape), y.reshape(x.shape)


def before(
  layer: nnx.Module | None,
  norm: nnx.RMSNorm,
  x: Float[Array, "B T E"],
  delta: Float[Array, "B T E"] | None,
  *,
  fused: bool,
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"], nnx.RMSNorm | None]:
  """(s, y, norm or None): s = x + delta, and what `layer` is to read, norm(s) or s with the norm left to it.

  A quantized layer takes the norm: its kernel may have it inside. `layer` is None where several read the same.
  """
  if delta is None and isinstance(layer, QuantLinear):
    return x, x, norm
  return *add_norm(norm, x, delta, fused=fused), None


def onto(
  layer: Any, x: Float[Array, "*B K"], residual: Float[Array, "*B N"]
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"] | None]:
  """(s, None) with s = residual + layer(x), if the layer is quantized and adds it itself, or (residual, layer(x))."""
  return (layer(x, residual=residual), None) if isinstance(layer, QuantLinear) else (residual, layer(x))


def normed(layer: Any, x: Float[Array, "*B K"], norm: nnx.RMSNorm | None) -> Float[Array, "*B N"]:
  """layer(norm(x)), or layer(x) where the norm is done."""
  return layer(x) if norm is None else layer(x, norm=norm)
