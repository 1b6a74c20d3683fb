# SPDX-License-Identifier: Apache-2.0
"""GPTQ on single matrices, against its algorithm written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax import QuantSpec, quantize_rtn
from marlin_jax.quantizers.gptq import inverse_factor, quantize_gptq

rtn = jax.jit(quantize_rtn, static_argnames="spec")  # without jit each call compiles its search anew


def correlated(rng, tokens, k):
  """Inputs as a model has them: features of very different size that go together."""
  mixing = rng.normal(size=(k, k)) * np.exp(rng.normal(size=(k, 1)))
  return (rng.normal(size=(tokens, k)) @ mixing / np.sqrt(k)).astype(np.float32)


def problem(rng, k=256, n=48):
  x = correlated(rng, 2048, k)
  return jnp.asarray(rng.normal(size=(k, n)), jnp.float32), x, jnp.asarray(x.T @ x)


def output_error(w, tensor, x):
  return float(np.sum((x @ (np.asarray(w) - np.asarray(tensor.dequantize()))) ** 2, dtype=np.float64))


def test_the_factor_is_that_of_the_inverse(rng):
  _, _, gram = problem(rng)
  upper, damping = inverse_factor(gram, 0.01)
  upper, gram = np.asarray(upper, np.float64), np.asarray(gram, np.float64)
  assert damping == np.float32(0.01)
  np.testing.assert_array_equal(upper, np.triu(upper))
  damped = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
  np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(len(gram)), atol=1e-3)


def test_it_is_algorithm_1(rng):
  """Row by row in float64, on the grids that it chose: the same codes but for ties that rounding decides."""
  w, _, gram = problem(rng)
  tensor = quantize_gptq(w, gram, QuantSpec(group_size=64)).tensor
  scales = np.repeat(np.asarray(tensor.scales, np.float64), 64, axis=0)
  h = np.asarray(gram, np.float64)
  h = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
  upper = np.linalg.cholesky(np.linalg.inv(h)).T
  rest, codes = np.asarray(w, np.float64), np.empty(w.shape)
  for k in range(len(h)):
    codes[k] = np.clip(np.round(rest[k] / scales[k]) + 8, 0, 15)
    error = (rest[k] - scales[k] * (codes[k] - 8)) / upper[k, k]
    rest = rest - upper[k][:, None] * error
  assert (codes == np.asarray(tensor.codes)).mean() > 0.995


# Either order with either number of bits, with zero points and without, with small groups and large ones.
@pytest.mark.parametrize(
  "bits, group_size, symmetric, act_order",
  [
    (4, 16, True, True),
    (4, 64, False, False),
    (4, 128, True, True),
    (4, None, True, False),
    (8, 128, True, False),
    (8, 64, False, True),
  ],
)
def test_outputs_are_better_than_those_of_rounding_to_nearest(rng, bits, group_size, symmetric, act_order):
  w, x, gram = problem(rng)
  spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
  tensor = quantize_gptq(w, gram, spec, act_order=act_order).tensor
  assert output_error(w, tensor, x) < (0.25 if act_order else 0.35) * output_error(w, rtn(w, spec), x)
  assert (tensor.permutation is not None) == act_order
  assert (tensor.zeros is None) == symmetric and tensor.bits == bits


def test_groups_that_divide_no_block(rng):
  w, x, gram = problem(rng, k=288)
  tensor = quantize_gptq(w, gram, QuantSpec(group_size=144)).tensor  # blocks of 16: they divide 144
  assert output_error(w, tensor, x) < 0.35 * output_error(w, rtn(w, QuantSpec(group_size=144)), x)


def test_act_order_takes_the_largest_inputs_first(rng):
  w, _, gram = problem(rng)
  permutation = np.asarray(quantize_gptq(w, gram, QuantSpec(), act_order=True).tensor.permutation)
  energy = np.diag(np.asarray(gram))[permutation]
  assert sorted(permutation.tolist()) == list(range(256)) and (np.diff(energy) <= 0).all()


def test_inputs_that_are_independent_leave_rounding_to_nearest(rng):
  w = jnp.asarray(rng.normal(size=(128, 16)), jnp.float32)
  gptq, nearest = quantize_gptq(w, jnp.eye(128), QuantSpec(), damping=0.0).tensor, rtn(w, QuantSpec())
  np.testing.assert_array_equal(gptq.codes, nearest.codes)
  np.testing.assert_array_equal(gptq.scales, nearest.scales)


def test_a_feature_that_was_never_seen_gets_the_zero_code(rng):
  w, x, _ = problem(rng)
  x[:, 7] = 0
  tensor, damping = quantize_gptq(w, jnp.asarray(x.T @ x), QuantSpec())
  np.testing.assert_array_equal(tensor.codes[7], 8)
  assert damping == np.float32(0.01)


def test_a_singular_hessian_is_repaired_and_said(rng):
  w, x, _ = problem(rng)
  x[:, 1:] = x[:, :1]  # rank one, and no damping asked for
  gram = jnp.asarray(x.T @ x)
  tensor, damping = quantize_gptq(w, gram, QuantSpec(), damping=0.0)
  assert 0 < damping <= 1
  assert output_error(w, tensor, x) < 0.1 * output_error(w, rtn(w, QuantSpec()), x)


def test_a_hessian_that_is_not_finite_is_not_repaired(rng):
  w, _, gram = problem(rng)
  assert np.isnan(quantize_gptq(w, gram.at[3, 3].set(jnp.nan), QuantSpec()).damping)


def test_scales_have_the_dtype_of_the_weight_and_codes_are_the_best_ones_for_them(rng):
  w, x, gram = problem(rng)
  tensor = quantize_gptq(w.astype(jnp.bfloat16), gram, QuantSpec()).tensor
  assert tensor.scales.dtype == jnp.bfloat16
  assert output_error(w, tensor, x) < 0.4 * output_error(w, rtn(w.astype(jnp.bfloat16), QuantSpec()), x)


def test_a_k_that_groups_do_not_divide_is_refused():
  with pytest.raises(ValueError, match="group_size=128 does not divide k=96"):
    quantize_gptq(jnp.ones((96, 4)), jnp.eye(96), QuantSpec())
