# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax import QuantSpec, pack, quant_matmul, quantize_rtn, unpack
from marlin_jax.quantizers.hqq import quantize_hqq

# Without jit the loops of both are compiled anew at each call.
hqq = jax.jit(quantize_hqq, static_argnames="spec")
rtn_plain = jax.jit(functools.partial(quantize_rtn, search=False), static_argnames="spec")


def far_off(w, tensor):
  """sum of |error in steps|^0.7: what HQQ minimizes."""
  scales = np.repeat(np.asarray(tensor.scales, np.float32), tensor.group_size, axis=0)
  return float(np.sum(np.abs((np.asarray(w) - np.asarray(tensor.dequantize())) / scales) ** 0.7))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 64, None])
def test_zero_points_lower_the_norm_of_the_errors(rng, bits, group_size):
  w = jnp.asarray(rng.normal(size=(256, 64)), jnp.float32)
  spec = QuantSpec(bits=bits, group_size=group_size, symmetric=False)
  tensor, plain = hqq(w, spec), rtn_plain(w, spec)
  np.testing.assert_array_equal(tensor.scales, plain.scales)  # only zero points are chosen
  assert far_off(w, tensor) < 0.999 * far_off(w, plain)
  zeros = np.asarray(tensor.zeros)
  assert (zeros != np.round(zeros)).mean() > 0.5


def test_heavy_tails_are_where_it_pays(rng):
  w = jnp.asarray(rng.standard_t(3, size=(512, 64)), jnp.float32)
  spec = QuantSpec(symmetric=False)
  assert far_off(w, hqq(w, spec)) < 0.97 * far_off(w, rtn_plain(w, spec))


def test_it_packs_and_multiplies(rng):
  w = jnp.asarray(rng.normal(size=(128, 64)), jnp.bfloat16)
  tensor = hqq(w, QuantSpec(group_size=32, symmetric=False))
  assert tensor.zeros.dtype == tensor.scales.dtype == jnp.bfloat16
  np.testing.assert_array_equal(unpack(pack(tensor)).codes, tensor.codes)
  x = jnp.asarray(rng.normal(size=(5, 128)), jnp.float32)
  np.testing.assert_allclose(quant_matmul(x, pack(tensor)), x @ tensor.dequantize(), rtol=1e-4, atol=1e-4)


def test_symmetric_grids_have_no_zero_point_to_choose():
  with pytest.raises(ValueError, match="symmetric=True must be False"):
    quantize_hqq(jnp.ones((128, 4)), QuantSpec())
