# SPDX-License-Identifier: Apache-2.0
"""What a kernel is measured on, random and never zero, and whether its result is right."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int16

from marlin_jax.bench.timing import copies_for_cold_l2
from pallas_kernels import MatmulProblem, layout24, qweight_shape
from pallas_kernels.reference import matmul_reference

# Rounding the result once explains a quarter of this, rounding the weights too half of it.
_MAX_ERROR = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
# Of the root mean square, for a single element: one that is wrong is off by about 1.
_MAX_OUTLIER = 2.0**-4


def random_weights(problem: MatmulProblem) -> list[tuple[Array | None, ...]]:
  """(qweight, scales), with zeros if the problem has them, or (qweight, scales, None, meta), until they are cold in L2.

  Every code is as likely as every other, and so is every integer zero point and every pair of places in a quad.
  """
  p = problem
  shape_of_words = layout24.qweight_shape(p.k, p.n) if p.sparse24 else qweight_shape(p.k, p.n, p.bits)
  weights = []
  for i in range(copies_for_cold_l2(math.prod(shape_of_words) * 2)):
    codes, sizes, points = jax.random.split(jax.random.key(i), 3)
    shape = (p.k // p.group_size, p.n)
    words = jax.random.bits(codes, shape_of_words, jnp.uint16)
    qweight = jax.lax.bitcast_convert_type(words, jnp.int16)
    scales = jax.random.uniform(sizes, shape, jnp.float32, 0.005, 0.02).astype(p.dtype)
    others: tuple[Array | None, ...] = ()
    if p.zeros:
      others = (jax.random.randint(points, shape, 0, 2**p.bits).astype(p.dtype),)
    if p.sparse24:
      others = (None, random_meta(points, layout24.meta_shape(p.k, p.n)))
    weights.append((qweight, scales, *others))
  return weights


def random_meta(key: Array, shape: tuple[int, ...]) -> Int16[Array, "N_tiles K_tiles 32 16"]:
  """Positions of kept codes, every pair as likely as every other."""
  pairs = jax.random.randint(key, (*shape, 4), 0, len(layout24.POSITIONS))
  nibbles = jnp.asarray(layout24.POSITIONS, jnp.uint16)[pairs]
  words = jnp.sum(nibbles << jnp.arange(0, 16, 4, dtype=jnp.uint16), axis=-1, dtype=jnp.uint16)
  return jax.lax.bitcast_convert_type(words, jnp.int16)


def random_x(problem: MatmulProblem) -> Float[Array, "M K"]:
  """Gaussian activations in the problem's dtype."""
  return jax.random.normal(jax.random.key(problem.m), (problem.m, problem.k), jnp.float32).astype(problem.dtype)


@jax.jit
def expected(x: Float[Array, "M K"], *weight: Array | None) -> Float[Array, "M N"]:
  """The reference's product, in float32."""
  return matmul_reference(x.astype(jnp.float32), *weight)


def check(y: Float[np.ndarray, "M N"], want: Float[np.ndarray, "M N"]) -> float:
  """The relative error of `y` in the 2-norm.

  Raises:
    ArithmeticError: it, or the error of a single element, is more than rounding explains.
  """
  difference = y.astype(np.float32) - want
  size = np.linalg.norm(want)
  error, limit = float(np.linalg.norm(difference) / size), _MAX_ERROR[y.dtype.name]
  if not error < limit:
    raise ArithmeticError(f"relative error {error:.1e} must be below {limit:.1e}")
  outlier = float(np.abs(difference).max() / size * want.size**0.5)
  if not outlier < _MAX_OUTLIER:
    raise ArithmeticError(
      f"an element is off by {outlier:.1e} of the mean size, which must be below {_MAX_OUTLIER:.1e}"
    )
  return error
