# SPDX-License-Identifier: Apache-2.0
"""Codes as subnormal numbers: the arithmetic, which hardware must not change, and what the instructions are made of."""

import re

import jax.numpy as jnp
import numpy as np

from pallas_kernels.hopper_subnormal import DECODE, LOWERED, RAISED_X


def masked(words):
  """The four halves that the assembly makes of each word, by its own masks and shifts."""
  shift = int(re.search(r"shr\.u32 t, \$4, (\d+)", DECODE)[1])
  pieces = re.findall(r"and\.b32 \$(\d), (\S+), 0x([0-9A-F]{4})([0-9A-F]{4})", DECODE)
  assert [int(place) for place, *_ in pieces] == [0, 1, 2, 3]
  assert all(high == low for *_, high, low in pieces)  # both halves of a word alike
  return [(words >> (shift if source == "t" else 0)) & int(mask, 16) for _, source, mask, _ in pieces]


def test_a_masked_code_is_a_bfloat16_of_its_size():
  words = np.arange(2**16, dtype=np.uint16)
  for i, bits in enumerate(masked(words)):
    code = words >> 4 * i & 15
    values = bits.astype(np.uint16).view(jnp.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(values, code * 2.0**-133 * (16 if i % 2 else 1))


def test_products_are_normal_numbers_and_exact(rng):
  """x * code, as float32 holds it, for every size of x that there may be; and its size is LOWERED."""
  x = (rng.uniform(1, 2, 1000) * 2.0 ** rng.integers(-57, 63, 1000)).astype(jnp.bfloat16)
  raised = x.astype(np.float32) * np.float32(RAISED_X)
  assert np.isfinite(raised.astype(jnp.bfloat16).astype(np.float32)).all()
  np.testing.assert_array_equal(raised.astype(jnp.bfloat16).astype(np.float64), x.astype(np.float64) * RAISED_X)
  for code in range(1, 16):
    product = raised.astype(np.float64) * (code * 2.0**-133)
    np.testing.assert_array_equal(product, x.astype(np.float64) * code * LOWERED)
    np.testing.assert_array_equal(product.astype(np.float32), product)
    assert (np.abs(product) >= np.finfo(np.float32).tiny).all() or code == 0
