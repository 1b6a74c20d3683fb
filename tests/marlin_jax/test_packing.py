# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax import QuantizedTensor, pack, unpack
from pallas_kernels import qweight_shape


@pytest.mark.parametrize("k, n, groups", [(128, 64, 1), (256, 192, 8), (96, 70, 3), (1, 1, 1)])
def test_pack_and_unpack_are_inverse_bit_for_bit(rng, k, n, groups):
  codes = jnp.asarray(rng.integers(0, 16, (k, n)), jnp.int8)
  tensor = QuantizedTensor(codes=codes, scales=jnp.asarray(rng.normal(size=(groups, n)), jnp.bfloat16))
  packed = jax.jit(pack)(tensor)
  assert packed.shape == (k, n) and packed.group_size == k // groups
  assert packed.qweight.shape == qweight_shape(k, n)
  back = jax.jit(unpack)(packed)
  np.testing.assert_array_equal(back.codes, codes)
  np.testing.assert_array_equal(back.scales, tensor.scales)
