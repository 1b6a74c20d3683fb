# SPDX-License-Identifier: Apache-2.0
"""GPTQ: input features are rounded one after the other, and the weights still to come make up for each error.

    minimize  sum_n (w_n - v_n)^T H (w_n - v_n),   H = sum of x x^T over the calibration tokens

With U the upper triangular factor of the inverse, H^-1 = U^T U, rounding row k of w to v leaves e = (w_k - v) / U_kk,
and every later row j is corrected by w_j -= U_kj e (Frantar et al., arXiv 2210.17323, algorithm 1). Rows are worked
through in blocks; a block's errors reach the rows beyond it in one product ("lazy batch-updates", section 4, step 2).

                 block
    rounded   |  k  ->  |  corrected once for all of the block
    ----------+---------+--------------------------------------> K

The grid of a group is searched when its first row is due, on the weights as corrected so far, and weighs the error of
row k by 1 / U_kk^2: what is left of it after the later rows have made up for what they can (section 3, equation 2).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from marlin_jax.quantized import QuantizedTensor, QuantSpec
from marlin_jax.quantizers.grid import Grid, search_grid

_LARGEST_BLOCK = 128
# Damping is raised tenfold until the factorization succeeds; a matrix that resists 100 times its mean holds NaN or Inf.
_LARGEST_DAMPING = 100.0


class GptqResult(NamedTuple):
  """A quantized weight, and the damping that it took: more than was asked for if H could not be factored with that."""

  tensor: QuantizedTensor
  damping: Float32[Array, ""]


class Factor(NamedTuple):
  """U with (H + d mean(diag H) I)^-1 = U^T U, and the damping d that it took."""

  upper: Float32[Array, "K K"]
  damping: Float32[Array, ""]


def inverse_factor(gram: Float32[Array, "K K"], damping: float) -> Factor:
  """The factor of the inverse of the damped `gram`, whose diagonal is positive; NaN where no damping up to 100 helps.

  The matrix is factored from its last feature to its first, H = R R^T with R upper triangular, so that U = R^-1: one
  factorization and one triangular inverse, where the usual way inverts H in between and loses half the digits.
  """
  mean = jnp.mean(jnp.diag(gram))
  eye = jnp.eye(gram.shape[0], dtype=jnp.float32)

  def factor(damping):
    lower = jnp.linalg.cholesky((gram + damping * mean * eye)[::-1, ::-1], symmetrize_input=False)
    return lower[::-1, ::-1]

  def again(state):
    damping, r = state
    return ~jnp.isfinite(r).all() & (damping < _LARGEST_DAMPING)

  def raise_damping(state):
    damping = 10 * jnp.maximum(state[0], 1e-4)
    return damping, factor(damping)

  damping = jnp.float32(damping)
  damping, r = jax.lax.while_loop(again, raise_damping, (damping, factor(damping)))
  return Factor(jax.scipy.linalg.solve_triangular(r, eye, lower=False), damping)


@partial(jax.jit, static_argnames=("spec", "damping", "act_order", "scale_dtype"))
def quantize_gptq(
  w: Float[Array, "K N"],
  gram: Float32[Array, "K K"],
  spec: QuantSpec,
  *,
  damping: float = 0.01,
  act_order: bool = False,
  scale_dtype=None,
) -> GptqResult:
  """The codes that bring x @ w nearest to what it was on the calibration data; jit-compiled, in float32.

  Args:
    w: finite weights, any float dtype.
    gram: sum of x x^T over the calibration tokens. A feature that was never used there gets the code of zero.
    spec: bits, group size and symmetry.
    damping: what is added to the diagonal of `gram`, in units of its mean.
    act_order: round the features with the largest inputs first, and make groups of features that are alike in this;
      the result has a permutation, which costs a gather of x.
    scale_dtype: of scales and zeros; default w's.

  Returns:
    The tensor, and the damping. If that is NaN or Inf, `gram` was.

  Raises:
    ValueError: the group size does not divide K.
  """
  groups = spec.groups(w.shape[0])
  scale_dtype = jnp.dtype(scale_dtype or w.dtype)
  w = w.astype(jnp.float32)
  energy = jnp.diag(gram)
  unused = energy == 0
  w = jnp.where(unused[:, None], 0, w)
  gram = gram + jnp.diag(jnp.where(unused, jnp.max(energy), 0))
  permutation = None
  if act_order:
    permutation = jnp.argsort(-energy, stable=True).astype(jnp.int32)
    w, gram = w[permutation], gram[permutation][:, permutation]
  upper, damping = inverse_factor(gram, damping)
  codes, grid = _round_rows(w, upper, spec, groups, scale_dtype)
  tensor = QuantizedTensor(
    codes=codes,
    scales=grid.scales,
    zeros=None if spec.symmetric else grid.zeros.astype(scale_dtype),
    permutation=permutation,
    bits=spec.bits,
  )
  return GptqResult(tensor, jnp.where(jnp.isfinite(upper).all(), damping, jnp.nan))


def _round_rows(w, upper, spec: QuantSpec, groups: int, scale_dtype) -> tuple[Array, Grid]:
  k, n = w.shape
  group = k // groups
  # A block within a group, and a group of whole blocks: a grid is searched at the start of a block.
  block = group if group <= _LARGEST_BLOCK else math.gcd(group, _LARGEST_BLOCK)
  importance = 1 / jnp.diag(upper) ** 2

  def group_step(g: Int32[Array, ""], carry):
    w, codes, grids = carry
    rows = jax.lax.dynamic_slice_in_dim(w, g * group, group)
    weigh = jax.lax.dynamic_slice_in_dim(importance, g * group, group)
    grid = search_grid(rows[None], spec, scale_dtype, importance=weigh[None])
    w, codes = jax.lax.fori_loop(0, group // block, partial(block_step, g * group, grid), (w, codes))
    return w, codes, jax.tree.map(lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one, g, 0), grids, grid)

  def block_step(first, grid, i, carry):
    w, codes = carry
    start = first + i * block
    factor = jax.lax.dynamic_slice_in_dim(upper, start, block)  # [block, K], zero left of the block
    square = jax.lax.dynamic_slice_in_dim(factor, start, block, axis=1)

    def row_step(j, carry):
      rows, row_codes, errors = carry
      code = grid.codes(rows[j][None, None], spec.bits)
      error = (rows[j] - grid.values(code)[0, 0]) / square[j, j]
      # Rows above j are done and their entries of the factor are zero; row j is not read again.
      rows = rows - square[j][:, None] * error
      return rows, row_codes.at[j].set(code[0, 0]), errors.at[j].set(error)

    rows = jax.lax.dynamic_slice_in_dim(w, start, block)
    _, row_codes, errors = jax.lax.fori_loop(0, block, row_step, (rows, jnp.zeros_like(rows), jnp.zeros_like(rows)))
    # All rows, those of the block and above it too: they are not read again, and shapes that shrank would compile anew.
    w = w - jnp.matmul(factor.T, errors, precision=jax.lax.Precision.HIGHEST)
    return w, jax.lax.dynamic_update_slice_in_dim(codes, row_codes.astype(jnp.uint8), start, 0)

  empty = Grid(jnp.ones((groups, n), scale_dtype), jnp.zeros((groups, n), jnp.float32))
  _, codes, grids = jax.lax.fori_loop(0, groups, group_step, (w, jnp.zeros((k, n), jnp.uint8), empty))
  return codes, grids
