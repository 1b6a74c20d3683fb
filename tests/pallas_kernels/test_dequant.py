# SPDX-License-Identifier: Apache-2.0
"""The inline assembly and its plain twin, over every word there is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import dequant

ALL_WORDS = np.arange(2**16, dtype=np.uint16).view(np.int16).reshape(256, 256)


DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
# Two words for each pair of values of two nibbles: all 256 codes are met in every plane, beside every neighbour.
HIGH, LOW = ALL_WORDS, np.ascontiguousarray(ALL_WORDS.T[::-1])


def nibble(words, p):
  return (words.view(np.uint16) >> (4 * p) & 15).astype(np.int32)


@DTYPES
@pytest.mark.parametrize("zero", [0, 8])
@pytest.mark.parametrize("p", range(4))
def test_plain_twin_gives_nibble_minus_zero(dtype, p, zero):
  plane = dequant.nibble_plane(jnp.asarray(ALL_WORDS), p, dtype, zero=zero, use_asm=False)
  want = (nibble(ALL_WORDS, p) - zero) * dequant.DECODED[jnp.dtype(dtype)]
  np.testing.assert_array_equal(np.asarray(plane, np.float32), want)


@DTYPES
@pytest.mark.parametrize("zero", [0, 128])
@pytest.mark.parametrize("p", range(4))
def test_plain_twin_gives_byte_minus_zero(dtype, p, zero):
  plane = dequant.byte_plane(jnp.asarray(HIGH), jnp.asarray(LOW), p, dtype, zero=zero, use_asm=False)
  codes = 16 * nibble(HIGH, p) + nibble(LOW, p)
  assert set(np.unique(codes)) == set(range(256))
  want = (codes - zero) * dequant.DECODED_BYTE[jnp.dtype(dtype)]
  np.testing.assert_array_equal(np.asarray(plane, np.float32), want)


def numbers(bits: np.ndarray, dtype) -> np.ndarray:
  """What 16 bits stand for, by the definition of the format: subnormal numbers are numbers, on every processor."""
  fraction_bits, bias = (7, 127) if dtype == jnp.bfloat16 else (10, 15)
  exponent = bits.astype(int) >> fraction_bits & (1 << 15 - fraction_bits) - 1
  significand = (bits & (1 << fraction_bits) - 1) + (exponent > 0) * 2.0**fraction_bits
  return np.where(bits >> 15, -1, 1) * np.ldexp(significand, np.maximum(exponent, 1) - bias - fraction_bits)


@DTYPES
def test_numbers_are_what_finite_bits_stand_for(dtype):
  bits = np.arange(2**16, dtype=np.uint16)
  bits = bits[np.abs(numbers(bits, dtype)) <= float(jnp.finfo(dtype).max)]
  np.testing.assert_array_equal(numbers(bits, dtype), bits.view(dtype).astype(np.float64))
  assert len(bits) > 60_000 and numbers(np.uint16(0xF0), jnp.bfloat16) == 240 * 2.0**-133


def emulate(asm: str, operands: list[np.ndarray], dtype, *, exact=True) -> np.ndarray:
  """What the assembly does with pairs of operands, in numpy; both halves of a register, in order.

  Args:
    exact: an fma must not round.
  """
  low = [w.view(np.uint16).ravel() for w in operands]
  # The pair's other half is another one: it must not leak in.
  registers = {f"${i + 1}": w.astype(np.uint32) | w[::-1].astype(np.uint32) << 16 for i, w in enumerate(low)}

  def value(name):
    return registers[name] if name in registers else np.uint32(int(name, 0))

  for line in asm[asm.index(";") + 1 :].strip(" }").split(";"):
    if not line.strip():
      continue
    operation, names = line.split(maxsplit=1)
    out, *sources = (name.strip() for name in names.split(","))
    match operation.split("."):
      case ["shr", "u32"]:
        registers[out] = value(sources[0]) >> value(sources[1])
      case ["mov", "b32"]:
        registers[out] = value(sources[0])
      case ["lop3", "b32"]:
        assert sources[3] == "0xEA"  # (a & b) | c
        registers[out] = value(sources[0]) & value(sources[1]) | value(sources[2])
      case ["fma", "rn", "bf16x2" | "f16x2" as kind]:
        assert kind == ("bf16x2" if dtype == jnp.bfloat16 else "f16x2")
        result = np.uint32(0)
        for half in (0, 16):
          a, b, c = (
            numbers((value(s) >> np.uint32(half) & np.uint32(0xFFFF)).astype(np.uint16), dtype) for s in sources
          )
          bits = (a * b + c).astype(dtype).view(np.uint16)
          assert not exact or (numbers(bits, dtype) == a * b + c).all()
          result = result | bits.astype(np.uint32) << np.uint32(half)
        registers[out] = result
      case other:
        raise AssertionError(f"{other} is not emulated")
  return np.stack([(registers["$0"] >> np.uint32(half)).astype(np.uint16).view(dtype) for half in (0, 16)])


@pytest.fixture
def assembly(monkeypatch):
  """The assembly that a call would have run: its text and its operands."""
  calls = []

  def record(asm, args, constraints, pack, result_shape_dtypes):
    assert pack == 2 and constraints == "=r" + ",r" * len(args)
    calls.append((asm, [np.asarray(arg) for arg in args]))
    return [jnp.zeros(s.shape, s.dtype) for s in result_shape_dtypes]

  monkeypatch.setattr(dequant.plt, "elementwise_inline_asm", record)
  return calls


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("p", range(4))
@pytest.mark.parametrize("has_zeros", [False, True])
def test_the_instructions_emulated_bit_by_bit_equal_the_twin(assembly, dtype, p, has_zeros):
  for plane, words, middle in (
    (dequant.nibble_plane, [ALL_WORDS], 8),
    (dequant.byte_plane, [HIGH, LOW], 128),
  ):
    zero = 0 if has_zeros else middle
    plane(*map(jnp.asarray, words), p, dtype, zero=zero, use_asm=True)
    first, second = emulate(*assembly[-1], dtype)
    twin = np.asarray(plane(*map(jnp.asarray, words), p, dtype, zero=zero, use_asm=False)).ravel()
    np.testing.assert_array_equal(first.astype(np.float32), twin.astype(np.float32))
    np.testing.assert_array_equal(second[::-1].astype(np.float32), twin.astype(np.float32))


def zero_points(rng, fractional):
  """One for each word, in bfloat16."""
  drawn = rng.uniform(0, 15, ALL_WORDS.shape) if fractional else rng.integers(0, 16, ALL_WORDS.shape)
  return drawn.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("p", range(4))
@pytest.mark.parametrize("fractional", [False, True])
def test_a_zero_point_of_each_word_is_subtracted_and_rounded_once(assembly, rng, p, fractional):
  zeros = zero_points(rng, fractional)
  exact = nibble(ALL_WORDS, p) - zeros.astype(np.float64)
  want = (exact.astype(ml_dtypes.bfloat16).astype(np.float64) / 64).ravel()
  args = jnp.asarray(ALL_WORDS), p, jnp.bfloat16
  twin = dequant.nibble_plane(*args, zero=jnp.asarray(zeros), use_asm=False)
  np.testing.assert_array_equal(np.asarray(twin, np.float64).ravel(), want)
  dequant.nibble_plane(*args, zero=jnp.asarray(zeros), use_asm=True)
  first, second = emulate(*assembly[-1], ml_dtypes.bfloat16, exact=not fractional)
  np.testing.assert_array_equal(first.astype(np.float64), want)
  np.testing.assert_array_equal(second[::-1].astype(np.float64), want)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("plane, words, zeros", [(dequant.nibble_plane, 1, (0, 8)), (dequant.byte_plane, 2, (0, 128))])
def test_the_assembly_on_the_gpu_equals_the_twin(dtype, plane, words, zeros):
  def kernel(*refs, p, zero):
    *word_refs, out_ref = refs
    out_ref[...] = plane(*(ref[...] for ref in word_refs), p, dtype, zero=zero, use_asm=True)

  args = [jnp.asarray(array) for array in (HIGH, LOW)[:words]]
  for p, zero in itertools.product(range(4), zeros):
    got = pl.pallas_call(
      functools.partial(kernel, p=p, zero=zero),
      out_shape=jax.ShapeDtypeStruct(ALL_WORDS.shape, dtype),
      grid=(16,),
      in_specs=[pl.BlockSpec((16, 256), lambda i: (i, 0))] * words,
      out_specs=pl.BlockSpec((16, 256), lambda i: (i, 0)),
      compiler_params=plt.CompilerParams(num_warps=4),
    )(*args)
    np.testing.assert_array_equal(got, plane(*args, p, dtype, zero=zero, use_asm=False))


@pytest.mark.gpu
@pytest.mark.parametrize("fractional", [False, True])
def test_zero_points_of_each_word_on_the_gpu_equal_the_twin(rng, fractional):
  def kernel(words_ref, zeros_ref, out_ref, *, p):
    out_ref[...] = dequant.nibble_plane(words_ref[...], p, jnp.bfloat16, zero=zeros_ref[...], use_asm=True)

  words, zeros = jnp.asarray(ALL_WORDS), jnp.asarray(zero_points(rng, fractional))
  block = pl.BlockSpec((16, 256), lambda i: (i, 0))
  for p in range(4):
    got = pl.pallas_call(
      functools.partial(kernel, p=p),
      out_shape=jax.ShapeDtypeStruct(ALL_WORDS.shape, jnp.bfloat16),
      grid=(16,),
      in_specs=[block] * 2,
      out_specs=block,
      compiler_params=plt.CompilerParams(num_warps=4),
    )(words, zeros)
    np.testing.assert_array_equal(got, dequant.nibble_plane(words, p, jnp.bfloat16, zero=zeros, use_asm=False))
