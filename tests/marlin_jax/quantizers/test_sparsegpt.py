# SPDX-License-Identifier: Apache-2.0
"""SparseGPT, alone and joined with GPTQ's rounding, against its algorithm written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax import QuantSpec, pack24, unpack
from marlin_jax.quantizers.gptq import prune_sparsegpt, quantize_gptq
from marlin_jax.quantizers.sparse24 import magnitude_mask, quantize_sparse24, wanda_mask
from tests.marlin_jax.quantizers.test_gptq import output_error, problem

SPEC = QuantSpec(group_size=64, sparse24=True)


def reference(w, gram, scales=None, group_size=64):
  """SparseGPT in loops over rows and columns, with GPTQ's rounding to `scales` [G, N], or without: the weights."""
  h = np.asarray(gram, np.float64)
  h = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
  upper = np.linalg.cholesky(np.linalg.inv(h)).T
  rest, final = np.asarray(w, np.float64), np.zeros(w.shape)
  for k in range(len(h)):
    if k % 4 == 0:
      quad = np.arange(k, k + 4)
      scores = rest[quad] ** 2 / np.diag(upper)[quad, None] ** 2
      kept = np.zeros(scores.shape, bool)
      for n in range(w.shape[1]):
        kept[np.argsort(scores[:, n])[2:], n] = True
    for n in range(w.shape[1]):
      if kept[k % 4, n]:
        final[k, n] = rest[k, n]
        if scales is not None:
          s = float(scales[k // group_size, n])
          final[k, n] = s * np.clip(np.round(rest[k, n] / s), -8, 7)
    rest = rest - upper[k][:, None] * ((rest[k] - final[k]) / upper[k, k])
  return final


def quads(kept):
  """How many of every four consecutive k are kept, [K / 4, N]."""
  return np.asarray(kept).reshape(-1, 4, kept.shape[1]).sum(1)


@pytest.mark.parametrize("k", [100, 256])  # one block of 100 rows, two of 128
def test_it_is_the_algorithm_of_the_paper(rng, k):
  w, _, gram = problem(rng, k=k, n=24)
  got, want = np.asarray(prune_sparsegpt(w, gram, fit=False)), reference(w, gram)
  assert (quads(got != 0) == 2).all()
  # A column where two scores are so close that float32 and float64 choose differently goes another way from there on.
  same = ((got != 0) == (want != 0)).all(0)
  assert same.mean() > 0.8
  np.testing.assert_allclose(got[:, same], want[:, same], rtol=1e-3, atol=1e-4)


def test_with_rounding_it_is_that_and_gptq_at_once(rng):
  w, _, gram = problem(rng)
  tensor = quantize_gptq(w, gram, SPEC, fit=False).tensor
  want = reference(w, gram, np.asarray(tensor.scales))
  assert (np.abs(np.asarray(tensor.dequantize()) - want) < 1e-4).mean() > 0.97


def test_codes_are_sparse_and_survive_packing(rng):
  w, _, gram = problem(rng)
  tensor = quantize_gptq(w.astype(jnp.bfloat16), gram, SPEC).tensor
  codes = np.asarray(tensor.codes)
  assert (quads(codes != 8) <= 2).all() and (codes != 8).mean() > 0.45  # some that are kept round to zero
  assert tensor.scales.dtype == jnp.bfloat16 and tensor.zeros is None and tensor.permutation is None
  np.testing.assert_array_equal(unpack(pack24(tensor)).codes, codes)


def test_the_scales_are_made_for_the_weights_that_are_kept(rng):
  """The larger half of a group fills its grid; a grid made for all, whose small ones count too, would be finer."""
  w, x, gram = problem(rng)
  sparse = quantize_gptq(w, gram, SPEC, fit=False).tensor
  dense_scales = quantize_gptq(w, gram, QuantSpec(group_size=64)).tensor.scales
  want = reference(w, gram, np.asarray(sparse.scales))
  other = reference(w, gram, np.asarray(dense_scales))
  errors = [np.sum((x @ (np.asarray(w) - v)) ** 2) for v in (want, other)]
  assert errors[0] < errors[1]


def test_outputs_are_better_than_wanda_s_and_those_than_magnitude_s(rng):
  w, x, _ = problem(rng)
  x = x * np.exp(rng.normal(size=256)).astype(np.float32)
  gram = jnp.asarray(x.T @ x)
  energy = jnp.diag(gram)
  rounded = jax.jit(quantize_sparse24, static_argnames="spec")
  magnitude = output_error(w, rounded(w, SPEC), x)
  wanda = output_error(w, rounded(w, SPEC, wanda_mask(w, jnp.sqrt(energy)), importance=energy), x)
  sparsegpt = output_error(w, quantize_gptq(w, gram, SPEC, fit=False).tensor, x)
  fitted = output_error(w, quantize_gptq(w, gram, SPEC).tensor, x)
  assert fitted < 0.7 * sparsegpt and sparsegpt < 0.5 * wanda and wanda < 0.9 * magnitude


def test_a_fit_keeps_what_sparsegpt_keeps_and_rounding_keeps_the_mask(rng):
  w, x, gram = problem(rng)
  pruned, fitted = (np.asarray(prune_sparsegpt(w, gram, fit=fit)) for fit in (False, True))
  np.testing.assert_array_equal(pruned != 0, fitted != 0)
  errors = [np.sum((x @ (np.asarray(w) - v)) ** 2) for v in (fitted, pruned)]
  assert errors[0] < 0.7 * errors[1]
  tensor = quantize_gptq(w, gram, SPEC).tensor
  assert (np.asarray(tensor.codes)[fitted == 0] == 8).all()
  assert output_error(w, tensor, x) < 1.5 * errors[0]


def test_without_correlations_it_prunes_as_magnitude_does(rng):
  w = jnp.asarray(rng.normal(size=(128, 16)), jnp.float32)
  got = prune_sparsegpt(w, jnp.eye(128), damping=0.0, fit=False)
  np.testing.assert_allclose(got, jnp.where(magnitude_mask(w), w, 0), atol=1e-6)


def test_a_feature_that_was_never_seen_is_pruned(rng):
  w, x, _ = problem(rng)
  x[:, 7] = 0
  assert (np.asarray(prune_sparsegpt(w, jnp.asarray(x.T @ x)))[7] == 0).all()


def test_what_has_no_quads_is_refused():
  w, gram = jnp.ones((98, 4)), jnp.eye(98)
  with pytest.raises(ValueError, match="k=98 must be a multiple of 4"):
    quantize_gptq(w, gram, QuantSpec(group_size=None, sparse24=True))
  with pytest.raises(ValueError, match="k=98 must be a multiple of 4"):
    prune_sparsegpt(w, gram, fit=False)
  with pytest.raises(ValueError, match="act_order=True must be False"):
    quantize_gptq(jnp.ones((64, 4)), jnp.eye(64), SPEC, act_order=True)
