# SPDX-License-Identifier: Apache-2.0
"""2:4 sparsity: of every four consecutive k of a column the two weights that matter most are kept, then rounded.

A mask is True where a weight is kept, two of every four:

    magnitude   |w[k, n]|                      the largest weights
    Wanda       |w[k, n]| * norms[k]           the largest contributions to the outputs, norms[k] = ||x[:, k]||_2
                                               (Sun et al., arXiv 2306.11695, section 3)

SparseGPT chooses while it corrects what is left, row by row, and is part of GPTQ (quantizers/gptq.py). Once the mask is
there, `refit` finds the best values of what is kept, whoever chose it.
Pruned weights are zero before the scales are searched, so scales fit what is left, and zero is the middle code.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from marlin_jax.quantized import QuantizedTensor, QuantSpec
from marlin_jax.quantizers.rtn import quantize_rtn

# Of conjugate gradients: on Hessians of condition 1e8, damped by 0.01, the error is within 0.1 % of the least.
_STEPS = 40


def mask24(scores: Float[Array, "K N"]) -> Bool[Array, "K N"]:
  """True at the two largest scores of every four consecutive k; of equal ones the first. jit-able.

  Where K is no multiple of four, the last one, two or three k are a quad of their own.
  """
  k, n = scores.shape
  quads = jnp.pad(scores, ((0, -k % 4), (0, 0)), constant_values=-jnp.inf).reshape(-1, 4, n)
  one, other = quads[:, :, None], quads[:, None]  # each against each, [quads, 4, 4, N]: faster than sorting four
  first = np.less.outer(np.arange(4), np.arange(4))[:, :, None]
  better = (one > other) | ((one == other) & first)
  return (jnp.sum(better, axis=1) < 2).reshape(-1, n)[:k]


def magnitude_mask(w: Float[Array, "K N"]) -> Bool[Array, "K N"]:
  """The two largest |w| of every four."""
  return mask24(jnp.abs(w))


def wanda_mask(w: Float[Array, "K N"], norms: Float[Array, " K"]) -> Bool[Array, "K N"]:
  """The two largest |w[k, n]| * norms[k] of every four, in float32.

  Args:
    w: float weights.
    norms: of each input feature over the tokens of a calibration set, ||x[:, k]||_2; no negative ones.
  """
  return mask24(jnp.abs(w.astype(jnp.float32)) * norms.astype(jnp.float32)[:, None])


def refit(w: Float32[Array, "K N"], mask: Bool[Array, "K N"], hessian: Float32[Array, "K K"]) -> Float32[Array, "K N"]:
  """The weights v that are zero where the mask is False, with the least (w_n - v_n)^T H (w_n - v_n) in every column n.

  A column's equations are H[S, S] v[S] = H[S, :] w, S being what it keeps: another matrix a column, so they are solved
  by conjugate gradients with the diagonal for a preconditioner, all columns in one product a step; from w itself, the
  pruned weights left out. jit-able.

  Args:
    w: the weights whose outputs are wanted.
    mask: what is kept.
    hessian: H, positive definite: sum of x x^T over the calibration tokens, damped.
  """
  diagonal = jnp.diag(hessian)[:, None]

  def gradient(p):
    return jnp.where(mask, jnp.matmul(hessian, p, precision=jax.lax.Precision.HIGHEST), 0)

  def ratio(a, b):
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)  # a column that is solved has 0 / 0

  def step(_, carry):
    v, residual, direction, norm = carry
    image = gradient(direction)
    size = ratio(norm, jnp.sum(direction * image, axis=0))
    v, residual = v + size * direction, residual - size * image
    scaled = residual / diagonal
    previous, norm = norm, jnp.sum(residual * scaled, axis=0)
    return v, residual, scaled + ratio(norm, previous) * direction, norm

  v = jnp.where(mask, w, 0)
  residual = gradient(w - v)
  direction = residual / diagonal
  start = v, residual, direction, jnp.sum(residual * direction, axis=0)
  return jax.lax.fori_loop(0, _STEPS, step, start)[0]


def quantize_sparse24(
  w: Float[Array, "K N"],
  spec: QuantSpec,
  mask: Bool[Array, "K N"] | None = None,
  *,
  scale_dtype=None,
  importance: Float32[Array, " K"] | None = None,
) -> QuantizedTensor:
  """2:4 sparse codes and scales that approximate `w` where the mask is True; pure, jit-able (spec, scale_dtype static).

  Args:
    w: finite weights, any float dtype.
    spec: group size; 4 bits and symmetric.
    mask: what is kept, at most two of every four consecutive k; None is `magnitude_mask(w)`.
    scale_dtype: of scales, default w's.
    importance: weight of the squared error of each input feature in the search of scales; None weighs all alike.

  Raises:
    ValueError: the group size does not divide K, or the spec is not one of 2:4 sparsity.
  """
  if not spec.sparse24:
    raise ValueError(f"spec={spec} must have sparse24=True")
  kept = magnitude_mask(w) if mask is None else mask
  pruned = jnp.where(kept, w, jnp.zeros_like(w))
  return quantize_rtn(pruned, spec, scale_dtype=scale_dtype, importance=importance)
