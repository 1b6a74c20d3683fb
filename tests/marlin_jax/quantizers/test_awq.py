# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax import QuantSpec, quantize_rtn
from marlin_jax.quantizers.awq import output_error, search_awq_scales

SPEC = QuantSpec(group_size=64)


def problem(rng, *, outliers):
  size = np.ones(128)
  size[rng.choice(128, outliers, replace=False)] = 30
  x = (rng.normal(size=(2048, 128)) * size).astype(np.float32)
  weights = [jnp.asarray(rng.normal(size=(128, n)), jnp.float32) for n in (32, 48)]
  return x, weights, jnp.asarray(x.T @ x), jnp.asarray(np.abs(x).mean(0)), size


def test_the_error_of_the_output_is_that_of_the_products(rng):
  x, (w, _), gram, _, _ = problem(rng, outliers=2)
  approximation = quantize_rtn(w, SPEC).dequantize()
  want = np.sum((x.astype(np.float64) @ np.asarray(w - approximation, np.float64)) ** 2)
  np.testing.assert_allclose(output_error(w, approximation, gram), want, rtol=1e-3)


def test_features_with_large_inputs_are_scaled_up_and_outputs_gain(rng):
  _, weights, gram, magnitude, size = problem(rng, outliers=2)
  s = np.asarray(search_awq_scales(weights, gram, magnitude, SPEC))
  assert s[size > 1].min() > 1 > s[size == 1].max()
  np.testing.assert_allclose(s.max() * s.min(), 1, rtol=1e-5)
  scaled = plain = 0
  for w in weights:
    rounded = quantize_rtn(s[:, None] * w, SPEC, importance=jnp.diag(gram) / s**2).dequantize() / s[:, None]
    scaled += float(output_error(w, rounded, gram))
    plain += float(output_error(w, quantize_rtn(w, SPEC).dequantize(), gram))
  assert scaled < 0.4 * plain


def test_inputs_of_one_size_are_left_alone(rng):
  _, weights, gram, _, _ = problem(rng, outliers=0)
  s = search_awq_scales(weights, gram, jnp.ones(128), SPEC)
  np.testing.assert_array_equal(s, 1)


@pytest.mark.parametrize("magnitude", [0.0, 1e-30])
def test_a_feature_that_is_hardly_used_keeps_a_finite_scale(rng, magnitude):
  _, weights, gram, magnitudes, _ = problem(rng, outliers=2)
  s = np.asarray(search_awq_scales(weights, gram, magnitudes.at[5].set(magnitude), SPEC))
  assert np.isfinite(s).all() and s.min() > 0
