# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax import QuantSpec, pack, pack24, quant_matmul, quantize_rtn
from marlin_jax.packing import stack
from marlin_jax.quantizers.sparse24 import quantize_sparse24
from pallas_kernels import matmul


@pytest.fixture
def packed(rng):
  return pack(quantize_rtn(jnp.asarray(rng.normal(size=(128, 96)), jnp.bfloat16), QuantSpec()))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (2, 1, 4), (0,), (3, 0)])
def test_leading_dimensions_are_rows(rng, packed, batch):
  x = jnp.asarray(rng.normal(size=(*batch, 128)), jnp.bfloat16)
  y = quant_matmul(x, packed)
  assert y.shape == (*batch, 96) and y.dtype == x.dtype
  np.testing.assert_array_equal(y.reshape(-1, 96), matmul(x.reshape(-1, 128), packed.qweight, packed.scales))


@pytest.mark.parametrize("bits, symmetric", [(4, False), (8, True), (8, False)])
def test_zeros_bits_and_permutation_reach_the_product(rng, bits, symmetric):
  tensor = quantize_rtn(jnp.asarray(rng.normal(size=(128, 96)), jnp.float32), QuantSpec(bits=bits, symmetric=symmetric))
  order = jnp.asarray(rng.permutation(128), jnp.int32)
  x = jnp.asarray(rng.normal(size=(2, 3, 128)), jnp.float32)
  for w in (tensor, dataclasses.replace(tensor, permutation=order)):
    np.testing.assert_allclose(quant_matmul(x, pack(w)), x @ w.dequantize(), rtol=1e-5, atol=1e-5)


def test_a_sparse_weight_reaches_the_product(rng):
  tensor = quantize_sparse24(jnp.asarray(rng.normal(size=(128, 96)), jnp.float32), QuantSpec(sparse24=True))
  x, bias = jnp.asarray(rng.normal(size=(2, 3, 128)), jnp.float32), jnp.asarray(rng.normal(size=96), jnp.float32)
  y = quant_matmul(x, pack24(tensor), bias)
  np.testing.assert_allclose(y, x @ tensor.dequantize() + bias, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(y, quant_matmul(x, pack(tensor), bias))


def test_a_sparse_weight_on_a_gpu_takes_its_own_kernel(h200, rng):
  tensor = quantize_sparse24(jnp.asarray(rng.normal(size=(128, 96)), jnp.bfloat16), QuantSpec(sparse24=True))
  text = str(jax.make_jaxpr(lambda x, w: quant_matmul(x, w))(jnp.ones((2, 128), jnp.bfloat16), pack24(tensor)))
  assert f"w4a16_sparse24_{'hopper' if jax.__version_info__ >= (0, 11) else 'triton'}" in text


def test_bias_is_added_before_rounding_to_the_dtype_of_x(rng, packed):
  x, bias = jnp.asarray(rng.normal(size=(3, 128)), jnp.bfloat16), jnp.asarray(rng.normal(size=96), jnp.float32)
  y = quant_matmul(x, packed, bias)
  assert y.dtype == jnp.bfloat16
  exact = quant_matmul(x.astype(jnp.float32), packed) + bias
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_wrong_features_are_named(packed):
  with pytest.raises(ValueError, match="x has 127 features, the weight has K=128"):
    quant_matmul(jnp.ones((1, 127), jnp.bfloat16), packed)


def test_a_stack_of_weights_is_refused(packed):
  with pytest.raises(ValueError, match=r"w is a stack \(2,\) of weights, must be one of them"):
    quant_matmul(jnp.ones((1, 128), jnp.bfloat16), stack([packed, packed]))


def test_strict_dtype_promotion_is_enough(rng, packed):
  with jax.numpy_dtype_promotion("strict"):
    quant_matmul(jnp.asarray(rng.normal(size=(2, 128)), jnp.bfloat16), packed)


def test_the_inference_path_has_no_custom_vjp(packed):
  x = jnp.ones((2, 128), jnp.bfloat16)
  text = str(jax.make_jaxpr(lambda x, w: quant_matmul(x, w))(x, packed))
  assert "custom_vjp" not in text and "custom_jvp" not in text


def test_the_inference_path_on_a_gpu_is_the_kernel_without_custom_vjp(h200, packed):
  text = str(jax.make_jaxpr(lambda x, w: quant_matmul(x, w))(jnp.ones((2, 128), jnp.bfloat16), packed))
  assert "w4a16_triton" in text or "w4a16_hopper" in text
  assert "custom_vjp" not in text and "custom_jvp" not in text
