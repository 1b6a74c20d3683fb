# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import DeferredNorm, resolved
from pallas_kernels.reference import rms_norm


@pytest.mark.parametrize("shape", [(3, 128), (2, 5, 192), (0, 64)])
def test_resolved_it_is_the_norm(rng, shape):
  x = jnp.asarray(rng.normal(size=shape) * 10.0 ** rng.uniform(-2, 2, (*shape[:-1], 1)), jnp.float32)
  scale = jnp.asarray(rng.uniform(0.5, 2, shape[-1]), jnp.float32)
  deferred = DeferredNorm.of(x, scale, 0.25)
  assert deferred.shape == shape and deferred.dtype == x.dtype
  assert deferred.squares.shape == (shape[-1] // 64, np.prod(shape[:-1]))
  expected = rms_norm(x.reshape(-1, shape[-1]), scale, 0.25)
  np.testing.assert_allclose(resolved(deferred).reshape(expected.shape), expected, rtol=1e-5)


def test_an_array_is_resolved(rng):
  x = jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16)
  assert resolved(x) is x


def test_a_row_of_zeros_stays_finite():
  x = jnp.zeros((1, 64), jnp.bfloat16)
  np.testing.assert_array_equal(resolved(DeferredNorm.of(x, jnp.ones(64, jnp.bfloat16), 1e-5)), x)
