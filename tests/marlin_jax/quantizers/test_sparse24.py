# SPDX-License-Identifier: Apache-2.0
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_jax import QuantSpec, pack24, quantize_rtn, unpack
from marlin_jax.quantizers.sparse24 import magnitude_mask, mask24, quantize_sparse24, refit, wanda_mask

SPEC = QuantSpec(group_size=32, sparse24=True)
jitted = jax.jit(quantize_sparse24, static_argnames="spec")
MASKS = list(itertools.combinations(range(4), 2))  # in the order of which ties go to the first


def brute_force(scores: np.ndarray) -> np.ndarray:
  """The mask of [K, N] scores, K a multiple of four: each quad against all six masks, the first best one wins."""
  kept = np.zeros(scores.shape, bool)
  for k, n in itertools.product(range(0, scores.shape[0], 4), range(scores.shape[1])):
    quad = scores[k : k + 4, n]
    best = max(MASKS, key=lambda mask: sorted(quad[list(mask)], reverse=True))  # max takes the first of equal ones
    kept[[k + i for i in best], n] = True
  return kept


@settings(deadline=None, max_examples=15)
@given(quads=st.integers(1, 20), n=st.integers(1, 20), values=st.sampled_from([2, 5, None]), seed=st.integers(0, 999))
def test_the_mask_is_the_best_of_all_six_and_ties_go_to_the_first(quads, n, values, seed):
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(4 * quads, n)) if values is None else rng.integers(-values, values + 1, (4 * quads, n))
  w = np.asarray(w, np.float32)
  np.testing.assert_array_equal(jax.jit(magnitude_mask)(jnp.asarray(w)), brute_force(np.abs(w)))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=2)), ids=str)
def test_every_mask_is_found_whatever_the_signs(mask, signs):
  # A mask of codes with their offset of 8 would prune the large negative weights.
  w = np.array([0.1, -0.2, 0.2, -0.1], np.float32)
  w[list(mask)] = np.array([3, 2], np.float32) * signs
  np.testing.assert_array_equal(np.flatnonzero(magnitude_mask(jnp.asarray(w)[:, None])), mask)


def test_equal_weights_keep_the_first_two():
  np.testing.assert_array_equal(mask24(jnp.ones((8, 3)))[:, 1], [1, 1, 0, 0, 1, 1, 0, 0])
  np.testing.assert_array_equal(mask24(jnp.zeros((4, 1)))[:, 0], [1, 1, 0, 0])


@pytest.mark.parametrize("rest", [1, 2, 3])
def test_a_last_short_quad_keeps_two_at_the_most(rest):
  scores = jnp.arange(1.0, 5 + rest)[:, None]
  np.testing.assert_array_equal(mask24(scores)[4:, 0], np.arange(rest) >= rest - 2)


def test_wanda_weighs_each_input_feature_with_its_norm(rng):
  w, x = rng.normal(size=(64, 12)).astype(np.float32), rng.normal(size=(100, 64)) * 10.0 ** rng.uniform(-1, 1, 64)
  norms = np.linalg.norm(x, axis=0).astype(np.float32)
  mask = wanda_mask(jnp.asarray(w), jnp.asarray(norms))
  np.testing.assert_array_equal(mask, brute_force(np.abs(w) * norms[:, None]))
  assert (np.asarray(mask) != np.asarray(magnitude_mask(jnp.asarray(w)))).mean() > 0.1
  ones = wanda_mask(jnp.asarray(w), jnp.ones(64))
  np.testing.assert_array_equal(ones, magnitude_mask(jnp.asarray(w)))


def test_wanda_keeps_more_of_the_outputs_than_magnitude_where_features_differ(rng):
  w = jnp.asarray(rng.normal(size=(256, 32)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(64, 256)) * 10.0 ** rng.uniform(-1, 1, 256), jnp.float32)
  wanda, magnitude = (
    float(jnp.linalg.norm(x @ jnp.where(mask, 0, w)))
    for mask in (wanda_mask(w, jnp.linalg.norm(x, axis=0)), magnitude_mask(w))
  )
  assert wanda < 0.8 * magnitude


def test_pruned_weights_are_the_zero_code_and_the_others_are_rounded_with_their_own_scale(rng):
  w = jnp.asarray(rng.normal(size=(128, 24)), jnp.float32)
  mask = np.asarray(magnitude_mask(w))
  tensor = jitted(w, SPEC)
  codes = np.asarray(tensor.codes)
  assert (codes[~mask] == 8).all() and mask.sum() == codes.size // 2
  pruned = jnp.where(mask, w, 0)
  np.testing.assert_array_equal(
    codes, jax.jit(quantize_rtn, static_argnames="spec")(pruned, QuantSpec(group_size=32)).codes
  )
  # Half the weights, the larger half, at half the error a weight and more.
  error = np.linalg.norm(np.asarray(pruned - tensor.dequantize())) / np.linalg.norm(np.asarray(pruned))
  assert 0.02 < error < 0.12
  np.testing.assert_array_equal(unpack(pack24(tensor)).codes, codes)


def test_a_mask_of_the_caller_s_is_what_is_kept(rng):
  w = jnp.asarray(rng.normal(size=(64, 8)), jnp.bfloat16)
  mask = mask24(jnp.asarray(rng.random((64, 8)), jnp.float32))
  tensor = jitted(w, SPEC, mask)
  assert (np.asarray(tensor.codes)[~np.asarray(mask)] == 8).all()
  assert tensor.scales.dtype == jnp.bfloat16
  pack24(tensor)


def test_a_dense_spec_is_refused():
  with pytest.raises(ValueError, match="must have sparse24=True"):
    quantize_sparse24(jnp.ones((64, 4)), QuantSpec(group_size=32))


def test_a_fit_is_the_least_squares_solution_of_what_is_kept(rng):
  k, n = 64, 6
  x = rng.normal(size=(500, k)) @ (rng.normal(size=(k, k)) * np.exp(rng.normal(size=(k, 1))))
  w, hessian = rng.normal(size=(k, n)), x.T @ x
  mask = np.array(magnitude_mask(jnp.asarray(w, jnp.float32)))
  mask[:4, 0] = False  # a quad of which nothing is kept
  got = np.asarray(jax.jit(refit)(jnp.asarray(w, jnp.float32), jnp.asarray(mask), jnp.asarray(hessian, jnp.float32)))
  assert (got[~mask] == 0).all()

  def error(v):
    return np.sum((x @ (w - v)) ** 2, axis=0)

  best = np.zeros((k, n))
  for column in range(n):
    kept = mask[:, column]
    best[kept, column] = np.linalg.lstsq(x[:, kept], x @ w[:, column], rcond=None)[0]
  assert (error(got) < 1.01 * error(best)).all() and (error(got) < 0.5 * error(np.where(mask, w, 0))).all()


def test_a_fit_of_what_is_sparse_already_changes_nothing(rng):
  w = jnp.asarray(rng.normal(size=(64, 6)), jnp.float32)
  mask = magnitude_mask(w)
  w = jnp.where(mask, w, 0).at[:, 3].set(0)
  np.testing.assert_array_equal(jax.jit(refit)(w, mask, jnp.eye(64)), w)
