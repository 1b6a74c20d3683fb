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

2:4 sparsity (SparseGPT: Frantar & Alistarh, arXiv 2301.00774, sections 3.3 to 3.5): when the first of four rows is due,
the two with the smaller w_k^2 / U_kk^2 are pruned in every column, which is to say that v is 0 there. Only later rows
make up for a pruned one. So, if not told otherwise, a pass that rounds nothing chooses the mask, what is kept is fitted
to the outputs by least squares (`refit` in quantizers/sparse24.py), and a second pass, with that mask, rounds it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from marlin_jax.quantized import QuantizedTensor, QuantSpec
from marlin_jax.quantizers.grid import Grid, search_grid
from marlin_jax.quantizers.sparse24 import mask24, refit

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

  def factor(damping):
    lower = jnp.linalg.cholesky(_damped(gram, damping)[::-1, ::-1], symmetrize_input=False)
    return lower[::-1, ::-1]

  def again(state):
    damping, r = state
    return ~jnp.isfinite(r).all() & (damping < _LARGEST_DAMPING)

  def raise_damping(state):
    damping = 10 * jnp.maximum(state[0], 1e-4)
    return damping, factor(damping)

  damping = jnp.float32(damping)
  damping, r = jax.lax.while_loop(again, raise_damping, (damping, factor(damping)))
  return Factor(jax.scipy.linalg.solve_triangular(r, jnp.eye(len(r), dtype=jnp.float32), lower=False), damping)


@partial(jax.jit, static_argnames=("spec", "damping", "act_order", "fit", "scale_dtype"))
def quantize_gptq(
  w: Float[Array, "K N"],
  gram: Float32[Array, "K K"],
  spec: QuantSpec,
  *,
  damping: float = 0.01,
  act_order: bool = False,
  fit: bool = True,
  scale_dtype=None,
) -> GptqResult:
  """The codes that bring x @ w nearest to what it was on the calibration data; jit-compiled, in float32.

  2:4 sparse if the spec says so: weights are pruned as in `prune_sparsegpt`, and those that are kept are rounded.

  Args:
    w: finite weights, any float dtype.
    gram: sum of x x^T over the calibration tokens. A feature that was never used there gets the code of zero.
    spec: bits, group size, symmetry and sparsity.
    damping: what is added to the diagonal of `gram`, in units of its mean.
    act_order: round the features with the largest inputs first, and make groups of features that are alike in this;
      the result has a permutation, which costs a gather of x.
    fit: of 2:4 sparse weights, those that are kept, before they are rounded; False prunes and rounds in one pass.
    scale_dtype: of scales and zeros; default w's.

  Returns:
    The tensor, and the damping. If that is NaN or Inf, `gram` was.

  Raises:
    ValueError: the group size does not divide K; 2:4 sparsity with act_order, or with a K that 4 does not divide.
  """
  groups = spec.groups(w.shape[0])
  if spec.sparse24:
    _check_quads(w.shape[0])
    if act_order:
      raise ValueError("act_order=True must be False with 2:4 sparsity, which is one of neighbouring features")
  scale_dtype = jnp.dtype(scale_dtype or w.dtype)
  permutation = None
  if act_order:
    permutation = jnp.argsort(-jnp.diag(gram), stable=True).astype(jnp.int32)
    w, gram = w[permutation], gram[permutation][:, permutation]
  w, gram = _without_unused(w, gram)
  upper, damping = inverse_factor(gram, damping)
  mask = None if spec.sparse24 else jnp.ones((w.shape[0], 1), bool)
  if spec.sparse24 and fit:
    w, mask = _prune_and_fit(w, upper, _damped(gram, damping))
  codes, grid = _round_rows(w, upper, mask, spec, groups, scale_dtype)
  tensor = QuantizedTensor(
    codes=codes,
    scales=grid.scales,
    zeros=None if spec.symmetric else grid.zeros.astype(scale_dtype),
    permutation=permutation,
    bits=spec.bits,
  )
  return GptqResult(tensor, jnp.where(jnp.isfinite(upper).all(), damping, jnp.nan))


@partial(jax.jit, static_argnames=("damping", "fit"))
def prune_sparsegpt(
  w: Float[Array, "K N"], gram: Float32[Array, "K K"], *, damping: float = 0.01, fit: bool = True
) -> Float32[Array, "K N"]:
  """2:4 sparse weights that bring x @ w nearest to what it was on the calibration data: SparseGPT, without rounding.

  Args:
    w, gram, damping, fit: as for `quantize_gptq`.

  Returns:
    Weights of which two of every four consecutive k are zero; NaN if `gram` is not finite.

  Raises:
    ValueError: 4 does not divide K.
  """
  _check_quads(w.shape[0])
  w, gram = _without_unused(w, gram)
  upper, damping = inverse_factor(gram, damping)
  return _prune_and_fit(w, upper, _damped(gram, damping))[0] if fit else _prune_rows(w, upper)


def _prune_and_fit(w, upper, hessian) -> tuple[Array, Array]:
  mask = _prune_rows(w, upper) != 0
  return refit(w, mask, hessian), mask


def _prune_rows(w, upper) -> Array:
  block = _block(len(w))

  def finish(i, w):
    return _finish_block(w, upper, i * block, block, None, lambda row: row)

  return jax.lax.fori_loop(0, len(w) // block, finish, w)


def _damped(gram, damping) -> Array:
  return gram + damping * jnp.mean(jnp.diag(gram)) * jnp.eye(len(gram), dtype=jnp.float32)


def _check_quads(k: int) -> None:
  if k % 4:
    raise ValueError(f"k={k} must be a multiple of 4 for 2:4 sparsity by the Hessian")


def _without_unused(w: Array, gram: Array) -> tuple[Array, Array]:
  """`w` in float32 with zeros for the features that are always zero, and `gram` with something on their diagonal."""
  energy = jnp.diag(gram)
  unused = energy == 0
  gram = gram + jnp.diag(jnp.where(unused, jnp.max(energy), 0))
  return jnp.where(unused[:, None], 0, w.astype(jnp.float32)), gram


def _round_rows(w, upper, mask, spec: QuantSpec, groups: int, scale_dtype) -> tuple[Array, Grid]:
  k, n = w.shape
  group = k // groups
  block = _block(group)
  importance = 1 / jnp.diag(upper) ** 2

  def group_step(g: Int32[Array, ""], carry):
    w, grids = carry
    rows = jax.lax.dynamic_slice_in_dim(w, g * group, group)
    weigh = jax.lax.dynamic_slice_in_dim(importance, g * group, group)
    # Without a mask an estimate: later quads are yet to be corrected for earlier ones.
    kept = mask24(rows**2 * weigh[:, None]) if mask is None else jax.lax.dynamic_slice_in_dim(mask, g * group, group)
    grid = search_grid(jnp.where(kept, rows, 0)[None], spec, scale_dtype, importance=weigh[None])

    def nearest(row):
      return grid.values(grid.codes(row[None, None], spec.bits))[0, 0]

    def finish(i, w):
      return _finish_block(w, upper, g * group + i * block, block, mask, nearest)

    w = jax.lax.fori_loop(0, group // block, finish, w)
    return w, jax.tree.map(lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one, g, 0), grids, grid)

  empty = Grid(jnp.ones((groups, n), scale_dtype), jnp.zeros((groups, n), jnp.float32))
  w, grids = jax.lax.fori_loop(0, groups, group_step, (w, empty))
  codes = grids.codes(w.reshape(groups, group, n), spec.bits)  # of values that lie on the grid
  return codes.astype(jnp.uint8).reshape(k, n), grids


def _block(group: int) -> int:
  """A block within a group, and a group of whole blocks: a grid is searched at the start of a block."""
  return group if group <= _LARGEST_BLOCK else math.gcd(group, _LARGEST_BLOCK)


def _finish_block(w, upper, start, block: int, mask, nearest: Callable[[Array], Array]) -> Array:
  """`w` with its final values in the rows of a block, and all rows below corrected for that.

  They are zero where the mask is False; None chooses one of 2:4 sparsity.
  """
  factor = jax.lax.dynamic_slice_in_dim(upper, start, block)  # [block, K], zero left of the block
  square = jax.lax.dynamic_slice_in_dim(factor, start, block, axis=1)

  def row_step(j, kept, carry):
    rows, errors = carry
    value = jnp.where(kept, nearest(rows[j]), 0)
    error = (rows[j] - value) / square[j, j]
    # Rows above j are done, and their entries of the factor are zero.
    return (rows - square[j][:, None] * error).at[j].set(value), errors.at[j].set(error)

  def quad_step(i, carry):
    quad = jax.lax.dynamic_slice_in_dim(carry[0], 4 * i, 4)
    diagonal = jax.lax.dynamic_slice_in_dim(jnp.diag(square), 4 * i, 4)
    kept = mask24((quad / diagonal[:, None]) ** 2)
    return jax.lax.fori_loop(0, 4, lambda j, carry: row_step(4 * i + j, kept[j], carry), carry)

  rows = jax.lax.dynamic_slice_in_dim(w, start, block)
  carry = rows, jnp.zeros_like(rows)
  if mask is None:
    rows, errors = jax.lax.fori_loop(0, block // 4, quad_step, carry)
  else:
    kept = jax.lax.dynamic_slice_in_dim(mask, start, block)
    rows, errors = jax.lax.fori_loop(0, block, lambda j, carry: row_step(j, kept[j], carry), carry)
  # All rows: those above the block have zeros in the factor, too, and shapes that shrank would compile anew.
  w = w - jnp.matmul(factor.T, errors, precision=jax.lax.Precision.HIGHEST)
  return jax.lax.dynamic_update_slice_in_dim(w, rows, start, 0)
