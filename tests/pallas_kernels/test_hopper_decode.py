# SPDX-License-Identifier: Apache-2.0
"""What the Hopper kernel's assembly makes of a word of codes: its masks and constants, in exact arithmetic."""

import re
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequant import DECODED, OF_BITS
from pallas_kernels.hopper_fragments import DECODED_SCALED, OF_BITS_SCALED, _decode_asm

BF16, F16 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)


def masked(words, dtype):
  """The four values that the assembly's masks and constants make of each 16-bit half of a word."""
  text = _decode_asm(dtype, ("a", "b", "c", "d"))
  shift = int(re.search(r"shr\.u32 t, \$4, (\d+)", text)[1])
  pieces = re.findall(r"lop3\.b32 \$(\d), (\S+), 0x(\w{4})(\w{4}), 0x(\w{4})(\w{4}), 0xEA", text)  # a & b | c
  assert [int(place) for place, *_ in pieces] == [0, 1, 2, 3]
  for _, source, *halves in pieces:
    assert halves[0::2] == halves[1::2]  # both halves of a word alike
    mask, one = (int(half, 16) for half in halves[0::2])
    bits = (words >> (shift if source == "t" else 0)) & mask | one
    yield bits.astype(np.uint16).view(dtype)


def halves_of_all_codes():
  """Halves of words with each code at each place; what is beside it must not matter."""
  return np.arange(2**16, dtype=np.uint32) * 0x10001  # both halves


@DTYPES
def test_a_nibble_becomes_itself_less_its_zero_point_exactly(dtype):
  words = halves_of_all_codes()
  for place, values in enumerate(masked(words, dtype)):
    factor, offset = OF_BITS[dtype][place % 2]
    codes = words >> 4 * place & 15
    assert np.array_equal(values.astype(np.float64) * factor + offset, codes * DECODED[dtype])
    for zero in (0, 8, 15):
      constant = offset - zero * DECODED[dtype]
      assert float(np.asarray(constant, dtype)) == constant  # the instruction's operand holds it
      exact = (codes.astype(np.float64) - zero) * DECODED[dtype]
      assert np.array_equal(exact.astype(dtype).astype(np.float64), exact)  # and its result


def test_with_its_scale_it_is_rounded_once(rng):
  """bits * (s * factor) + s * offset of exact operands is (code - 8) * s, which the instruction rounds once."""
  scales = np.concatenate([rng.uniform(0.001, 0.1, 50), 2.0 ** rng.integers(-60, 33, 50)]).astype(BF16)
  for place, values in enumerate(masked(np.arange(16, dtype=np.uint32) * 0x1111, BF16)):
    for scale in scales:
      operands = [scale * np.asarray(part, BF16) for part in OF_BITS_SCALED[place % 2]]
      parts = [Fraction(float(scale)) * Fraction(part) for part in OF_BITS_SCALED[place % 2]]
      assert [Fraction(float(operand)) for operand in operands] == parts
      exact = [Fraction(float(v)) * Fraction(float(operands[0])) + Fraction(float(operands[1])) for v in values]
      assert exact == [(code - 8) * Fraction(float(scale)) * Fraction(DECODED_SCALED) for code in range(16)]
