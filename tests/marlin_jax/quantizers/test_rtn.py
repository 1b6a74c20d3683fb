# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_jax import QuantSpec, quantize_rtn

# Without jit the loop of its search is compiled anew at each call; `test_it_is_jitable` holds both to one result.
rtn = jax.jit(quantize_rtn, static_argnames=("spec", "scale_dtype"))


def squared_error(w, tensor):
  return float(jnp.sum((w.astype(jnp.float32) - tensor.dequantize()) ** 2))


def test_search_beats_the_usual_scale_by_a_quarter_on_gaussian_weights(rng):
  w = jnp.asarray(rng.normal(size=(1024, 64)), jnp.float32)
  grouped = np.asarray(w).reshape(8, 128, 64)
  scale = np.abs(grouped).max(1, keepdims=True) / 7
  usual = np.sum((grouped - scale * np.clip(np.round(grouped / scale), -8, 7)) ** 2)
  assert squared_error(w, rtn(w, QuantSpec())) < 0.75 * usual


def test_every_code_is_used(rng):
  w = jnp.asarray(rng.normal(size=(512, 64)), jnp.float32)
  assert set(np.unique(rtn(w, QuantSpec()).codes)) == set(range(16))


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_on_the_grid_are_exact(rng, sign):
  # -8 .. 7 times a power of two, in either direction: a scale of that size, of either sign, reproduces them.
  codes = np.concatenate([np.arange(16), rng.integers(0, 16, 112)])[:, None]
  w = jnp.asarray(sign * 0.25 * (codes - 8), jnp.bfloat16)
  exact = rtn(w, QuantSpec())
  # f = 1 is no candidate of the grid, but one within rounding of every code: only the scale is off, by under 2 %.
  np.testing.assert_array_equal(exact.codes, codes)
  np.testing.assert_allclose(np.asarray(exact.scales, np.float32), sign * 0.25, rtol=0.02)


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_smaller_groups_err_less_and_each_group_is_on_its_own(rng, group_size):
  magnitude = 10.0 ** rng.uniform(-3, 0, (16, 1, 8))  # every 32 rows of a column have a size of their own
  w = jnp.asarray((magnitude * rng.normal(size=(16, 32, 8))).reshape(512, 8), jnp.float32)
  tensor = rtn(w, QuantSpec(group_size=group_size))
  assert tensor.group_size == (group_size or 512)
  if group_size:
    first = rtn(w[:group_size], QuantSpec(group_size=group_size))
    np.testing.assert_array_equal(tensor.codes[:group_size], first.codes)
    assert squared_error(w, tensor) <= squared_error(w, rtn(w, QuantSpec(group_size=None)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bits_err_some_sixteen_times_less_than_four(rng, symmetric):
  w = jnp.asarray(rng.normal(size=(512, 32)), jnp.float32)
  errors = [squared_error(w, rtn(w, QuantSpec(bits=bits, symmetric=symmetric))) for bits in (4, 8)]
  assert 150 < errors[0] / errors[1] < 300


def test_zero_points_pay_where_weights_lie_on_one_side(rng):
  w = jnp.asarray(rng.uniform(0.5, 1.0, (256, 32)), jnp.float32) + jnp.asarray(rng.normal(size=(256, 32)), jnp.float32)
  symmetric, asymmetric = (rtn(w, QuantSpec(symmetric=s)) for s in (True, False))
  assert squared_error(w, asymmetric) < 0.8 * squared_error(w, symmetric)
  zeros = np.asarray(asymmetric.zeros)
  assert (
    asymmetric.zeros.dtype == w.dtype and (zeros == np.round(zeros)).all() and 0 <= zeros.min() <= zeros.max() <= 15
  )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_half_a_step_is_the_largest_error_without_clipping(rng, bits, symmetric):
  w = jnp.asarray(rng.uniform(-1, 1, (128, 16)), jnp.float32)
  tensor = rtn(w, QuantSpec(bits=bits, symmetric=symmetric))
  error = np.abs(np.asarray(w - tensor.dequantize())) / np.abs(np.asarray(tensor.scales))
  inside = (np.asarray(tensor.codes) > 0) & (np.asarray(tensor.codes) < 2**bits - 1)
  assert inside.mean() > 0.8 and error[inside].max() <= 0.501


def test_a_group_of_zeros_has_scale_one_and_stays_zero():
  w = jnp.zeros((128, 3), jnp.bfloat16).at[:, 1].set(1)
  tensor = rtn(w, QuantSpec())
  np.testing.assert_array_equal(tensor.scales[0, jnp.array([0, 2])], 1)
  np.testing.assert_array_equal(tensor.dequantize()[:, jnp.array([0, 2])], 0)


@settings(deadline=None, max_examples=20)
@given(exponent=st.integers(-40, 30), seed=st.integers(0, 1000), dtype=st.sampled_from(["bfloat16", "float32"]))
def test_scales_are_finite_and_never_zero_whatever_the_magnitude(exponent, seed, dtype):
  w = jnp.asarray(2.0**exponent * np.random.default_rng(seed).normal(size=(64, 4)), jnp.dtype(dtype))
  tensor = rtn(w, QuantSpec(group_size=32))
  scales = np.asarray(tensor.scales, np.float64)
  assert tensor.scales.dtype == w.dtype and np.isfinite(scales).all() and (scales != 0).all()
  assert squared_error(w, tensor) <= 0.02 * float(jnp.sum(w.astype(jnp.float32) ** 2))


def test_stored_scales_are_the_ones_the_codes_were_chosen_for(rng):
  w = jnp.asarray(rng.normal(size=(128, 32)), jnp.float32)
  tensor = rtn(w, QuantSpec(), scale_dtype=jnp.bfloat16)
  assert tensor.scales.dtype == jnp.bfloat16
  best = np.clip(np.round(np.asarray(w) / np.asarray(tensor.scales, np.float32)), -8, 7) + 8
  np.testing.assert_array_equal(tensor.codes, best)


def test_it_is_jitable(rng):
  w = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
  jitted = rtn(w, QuantSpec(group_size=64))
  np.testing.assert_array_equal(jitted.codes, quantize_rtn(w, QuantSpec(group_size=64)).codes)


def test_a_k_that_groups_do_not_divide_is_refused():
  with pytest.raises(ValueError, match="group_size=128 does not divide k=96"):
    quantize_rtn(jnp.ones((96, 4)), QuantSpec())
