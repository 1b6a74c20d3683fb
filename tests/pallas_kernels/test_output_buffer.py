# SPDX-License-Identifier: Apache-2.0
"""What the kernels write on a GPU: every element of the result, and nothing beside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import layout, layout24, matmul
from tests.pallas_kernels import problems

BF16 = jnp.dtype(jnp.bfloat16)
NAN = 0x7FC5  # a pattern of bits that no kernel computes
needs_jax_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")


def adjacent(shape):
  """Three arrays full of NaN of which one lies right behind the other in device memory."""
  fill = jax.jit(lambda: jax.lax.bitcast_convert_type(jnp.full(shape, NAN, jnp.int16), BF16))
  arrays = sorted((fill() for _ in range(32)), key=lambda array: array.unsafe_buffer_pointer())
  for three in zip(arrays, arrays[1:], arrays[2:], strict=False):
    first, second, third = (array.unsafe_buffer_pointer() for array in three)
    if second - first == third - second == three[0].nbytes:
      return three
  raise AssertionError("no three of 32 allocations lie side by side")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [pytest.param("hopper", marks=needs_jax_0_11), "triton"])
@pytest.mark.parametrize("m", [1, 13, 17, 63, 100, 300])
@pytest.mark.parametrize("k, n", [(2048, 1152), (1280, 34048)])  # K split over a cluster, and blocks that take turns
@pytest.mark.parametrize("kind", ["symmetric", "zeros", "8 bits", "2:4"])
def test_every_element_is_written_and_nothing_beside_it(rng, implementation, m, k, n, kind):
  """The result goes to a donated buffer full of NaN, between two others; its rows are fewer than a block's."""
  x, codes, scales = problems.random(rng, m, k, n, k // 128, BF16)
  more = {}
  if kind == "2:4":
    qweight, more["meta"] = layout24.pack_codes(problems.prune24(codes))
    implementation = {"triton": "triton24"}.get(implementation, implementation)
  else:
    bits = 8 if kind == "8 bits" else 4
    codes, zeros = problems.with_zeros(rng, codes, scales, bits, BF16)
    qweight = layout.pack_codes(codes, bits)
    if kind == "zeros":
      more["zeros"] = zeros
  product = functools.partial(matmul, implementation=implementation)
  expected = jax.jit(product)(x, qweight, scales, **more)

  donated = jax.jit(lambda _, *args, **kwargs: product(*args, **kwargs), donate_argnums=0, keep_unused=True)
  compiled = donated.lower(expected, x, qweight, scales, **more).compile()
  before, y, behind = adjacent(expected.shape)
  address = y.unsafe_buffer_pointer()
  y = compiled(y, x, qweight, scales, **more)
  assert y.unsafe_buffer_pointer() == address
  if implementation == "hopper":
    root = next(line for line in compiled.as_text().split("ENTRY")[1].splitlines() if "ROOT" in line)
    assert "custom-call" in root or "get-tuple-element" in root, root  # the kernel itself writes there
  np.testing.assert_array_equal(y, expected)
  assert not np.isnan(np.asarray(y, np.float32)).any()
  for array in (before, behind):
    np.testing.assert_array_equal(np.asarray(array).view(np.int16), np.full(array.shape, NAN, np.int16))
