# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.add_norm import add_norm, rms_norm


def check(rng, rows, features, **options):
  x, delta = (jnp.asarray(rng.standard_normal((rows, features)), jnp.bfloat16) for _ in range(2))
  scale = jnp.asarray(rng.uniform(0.5, 2, features), jnp.bfloat16)
  norm = nnx.RMSNorm(features, epsilon=1e-5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  norm.scale[...] = scale
  total, y = add_norm(x, delta, scale, epsilon=1e-5, **options)
  np.testing.assert_array_equal(total, x + delta)
  np.testing.assert_allclose(y.astype(jnp.float32), norm(x + delta).astype(jnp.float32), rtol=2.0**-7)
  alone = rms_norm(total, scale, epsilon=1e-5, **options)
  np.testing.assert_allclose(alone.astype(jnp.float32), norm(total).astype(jnp.float32), rtol=2.0**-7)


@pytest.mark.parametrize("features", [64, 96])
def test_it_is_the_sum_and_its_norm(rng, features):
  check(rng, 3, features, interpret=True)


@pytest.mark.parametrize("features", [4096, 5120])
def test_it_lowers_for_an_h200(lower_for_h200, features):
  x, scale = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((16, features), (features,)))
  text = lower_for_h200(functools.partial(add_norm, epsilon=1e-5), x, x, scale)
  assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "features"), [(1, 4096), (128, 5120), (16, 8192)])
def test_on_a_gpu(rng, rows, features):
  check(rng, rows, features)
