# SPDX-License-Identifier: Apache-2.0
"""AWQ: input features with large activations are scaled up before rounding, and their inputs down by as much.

    x @ w = (x / s) @ (s w),   s_k = mean|x_k|^a,   a = argmin over 0, 1/20 .. 19/20 of the error of the output

A feature that is scaled by s > 1 is rounded as finely as before, in relation to the group's scale, and its error then
counts 1 / s (Lin et al., arXiv 2306.00978, section 3.2). What divides x by s costs nothing at run
time: it is folded into the layer before (marlin_jax/calibration). The error of the output is computed from H, the sum
of x x^T over the calibration tokens: |x (w - v)|^2 = sum_n (w_n - v_n)^T H (w_n - v_n).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from marlin_jax.quantized import QuantSpec
from marlin_jax.quantizers.rtn import quantize_rtn

_CANDIDATES = 20


@partial(jax.jit, static_argnames=("spec",))
def search_awq_scales(
  weights: Sequence[Float[Array, "K _"]],
  gram: Float32[Array, "K K"],
  magnitude: Float32[Array, " K"],
  spec: QuantSpec,
) -> Float32[Array, " K"]:
  """The factors s of the input features that all `weights` share: w is to be multiplied by them, x to be divided.

  Args:
    weights: of the layers that read the same x.
    gram: sum of x x^T over the calibration tokens.
    magnitude: mean of |x|, of every feature.
    spec: how the weights will be rounded: `quantize_rtn(s * w, spec, importance=diag(gram) / s^2)`.

  Returns:
    s, its geometric centre between the smallest and the largest at 1; all ones where no scaling helps.
  """
  magnitude = jnp.maximum(magnitude, 1e-4 * jnp.max(magnitude))

  def scales_of(exponent):
    s = magnitude**exponent
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))

  def error_of(exponent):
    s = scales_of(exponent)
    total = jnp.float32(0)
    for w in weights:
      rounded = quantize_rtn(s[:, None] * w, spec, scale_dtype=w.dtype, importance=jnp.diag(gram) / s**2)
      total += output_error(w, rounded.dequantize() / s[:, None], gram)
    return total

  exponents = jnp.asarray(np.arange(_CANDIDATES) / _CANDIDATES, jnp.float32)
  return scales_of(exponents[jnp.argmin(jax.lax.map(error_of, exponents))])


def output_error(
  w: Float[Array, "K N"], approximation: Float[Array, "K N"], gram: Float32[Array, "K K"]
) -> Float32[Array, ""]:
  """sum over the tokens of |x @ w - x @ approximation|^2, with gram the sum of x x^T over them."""
  error = w.astype(jnp.float32) - approximation.astype(jnp.float32)
  return jnp.sum(error * jnp.matmul(gram, error, precision=jax.lax.Precision.HIGHEST))
