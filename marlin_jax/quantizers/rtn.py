# SPDX-License-Identifier: Apache-2.0
"""Round to nearest, with the scale of every group searched for the least squared error (quantizers/grid.py)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from marlin_jax.quantized import QuantizedTensor, QuantSpec
from marlin_jax.quantizers.grid import search_grid


def quantize_rtn(
  w: Float[Array, "K N"],
  spec: QuantSpec,
  *,
  scale_dtype=None,
  importance: Float32[Array, " K"] | None = None,
  search: bool = True,
) -> QuantizedTensor:
  """The codes, scales and zeros that approximate `w`; pure, jit-able (spec, scale_dtype and search static).

  Args:
    w: finite weights, any float dtype; the search runs in float32.
    spec: bits, group size and symmetry.
    scale_dtype: of scales and zeros; default w's.
    importance: weight of the squared error of each input feature in the search; None weighs all alike.
    search: False takes the grid that just holds the largest weight of a group.

  Returns:
    Codes of every value from 0 to 2^bits - 1; a group of zeros gets scale 1. Scales are never zero.

  Raises:
    ValueError: the group size does not divide K.
  """
  k, n = w.shape
  scale_dtype = jnp.dtype(scale_dtype or w.dtype)
  groups = spec.groups(k)
  grouped = w.astype(jnp.float32).reshape(groups, k // groups, n)
  if importance is not None:
    importance = importance.reshape(groups, k // groups)
  grid = search_grid(grouped, spec, scale_dtype, importance=importance, search=search)
  return QuantizedTensor(
    codes=grid.codes(grouped, spec.bits).astype(jnp.uint8).reshape(k, n),
    scales=grid.scales,
    zeros=None if spec.symmetric else grid.zeros.astype(scale_dtype),
    bits=spec.bits,
  )
