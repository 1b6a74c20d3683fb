# SPDX-License-Identifier: Apache-2.0
"""HQQ: zero points chosen by half-quadratic splitting so that few weights are far off, without any data.

    minimize over the zero point z    sum over the group of |w - s (codes(z) - z)|^p,   p = 0.7

The error e is split off as a variable of its own, and two steps alternate, each in closed form (Badri and Shaji,
"Half-Quadratic Quantization of Large Machine Learning Models", 2023):

    e = shrink(w - s (codes - z))          shrink(x) = sign(x) max(|x| - |x|^(p - 1) / beta, 0)
    z = mean over the group of  codes - (w - e) / s        with beta growing by 1 % a step
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from marlin_jax.quantized import QuantizedTensor, QuantSpec
from marlin_jax.quantizers.grid import Grid, search_grid

_NORM, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20


def quantize_hqq(w: Float[Array, "K N"], spec: QuantSpec, *, scale_dtype=None) -> QuantizedTensor:
  """The codes, scales and zero points that approximate `w`; pure, jit-able (spec and scale_dtype static).

  Args:
    w: finite weights, any float dtype; the steps run in float32.
    spec: bits and group size; it must not be symmetric.
    scale_dtype: of scales and zeros; default w's.

  Returns:
    Zero points that are no whole numbers, rounded to scale_dtype.

  Raises:
    ValueError: spec is symmetric, or its group size does not divide K.
  """
  if spec.symmetric:
    raise ValueError(f"{spec.symmetric=} must be False: HQQ chooses zero points")
  k, n = w.shape
  scale_dtype = jnp.dtype(scale_dtype or w.dtype)
  groups = spec.groups(k)
  grouped = w.astype(jnp.float32).reshape(groups, k // groups, n)
  start = search_grid(grouped, spec, scale_dtype, search=False)
  # The unit of an error is the step of its group: in units of w, beta would mean another thing for every layer.
  steps = grouped / start.scales.astype(jnp.float32)[:, None]

  def error_of(grid: Grid) -> Array:
    errors = steps - (grid.codes(grouped, spec.bits) - grid.zeros[:, None])
    return jnp.sum(jnp.abs(errors) ** _NORM, axis=1)

  def step(carry, beta):
    zeros, best_error, best_zeros = carry
    codes = start._replace(zeros=zeros).codes(grouped, spec.bits)
    errors = steps - (codes - zeros[:, None])
    size = jnp.abs(errors)
    shrunk = jnp.sign(errors) * jnp.maximum(size - jnp.maximum(size, 1e-6) ** (_NORM - 1) / beta, 0)
    zeros = jnp.mean(codes - (steps - shrunk), axis=1).astype(scale_dtype).astype(jnp.float32)
    error = error_of(start._replace(zeros=zeros))
    better = error < best_error
    return (zeros, jnp.where(better, error, best_error), jnp.where(better, zeros, best_zeros)), None

  betas = _BETA * _GROWTH ** jnp.arange(_STEPS)
  (_, _, zeros), _ = jax.lax.scan(step, (start.zeros, error_of(start), start.zeros), betas)
  grid = start._replace(zeros=zeros)
  return QuantizedTensor(
    codes=grid.codes(grouped, spec.bits).astype(jnp.uint8).reshape(k, n),
    scales=grid.scales,
    zeros=zeros.astype(scale_dtype),
    bits=spec.bits,
  )
