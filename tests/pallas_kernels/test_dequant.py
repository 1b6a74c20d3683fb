# SPDX-License-Identifier: Apache-2.0
"""The inline assembly and its plain twin, over every word there is."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import dequant

ALL_WORDS = np.arange(2**16, dtype=np.uint16).view(np.int16).reshape(256, 256)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("p", range(4))
def test_plain_twin_gives_nibble_minus_eight(dtype, p):
  plane = dequant.nibble_plane(jnp.asarray(ALL_WORDS), p, dtype, use_asm=False)
  np.testing.assert_array_equal(np.asarray(plane, np.int32), (ALL_WORDS.view(np.uint16) >> (4 * p) & 15) - 8.0)


@pytest.mark.parametrize("dtype, numpy_dtype", [(jnp.bfloat16, ml_dtypes.bfloat16), (jnp.float16, np.float16)])
@pytest.mark.parametrize("p", range(4))
def test_the_instructions_emulated_bit_by_bit_equal_the_twin(dtype, numpy_dtype, p):
  # What the assembly does with a pair of words, in numpy: the pair's other half must not leak in.
  _, magic, one, offset = dequant._MAGIC[jnp.dtype(dtype)]
  low = ALL_WORDS.view(np.uint16).ravel()
  pair = low.astype(np.uint32) | low[::-1].astype(np.uint32) << 16
  bits = pair >> np.uint32(4 * p) & np.uint32(0x000F000F) | np.uint32(magic << 16 | magic)

  def as_float(half):
    return np.uint16(half).view(numpy_dtype).astype(np.float64)

  for half, words in ((0, low), (16, low[::-1])):
    value = (bits >> np.uint32(half) & np.uint32(0xFFFF)).astype(np.uint16).view(numpy_dtype).astype(np.float64)
    fma = (value * as_float(one) + as_float(offset)).astype(numpy_dtype)
    twin = dequant.nibble_plane(jnp.asarray(words.view(np.int16))[None], p, dtype, use_asm=False)[0]
    np.testing.assert_array_equal(fma.astype(np.float32), np.asarray(twin, np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_assembly_on_the_gpu_equals_the_twin(dtype):
  def kernel(words_ref, out_ref, *, p):
    out_ref[...] = dequant.nibble_plane(words_ref[...], p, dtype, use_asm=True)

  for p in range(4):
    plane = pl.pallas_call(
      functools.partial(kernel, p=p),
      out_shape=jax.ShapeDtypeStruct(ALL_WORDS.shape, dtype),
      grid=(16,),
      in_specs=[pl.BlockSpec((16, 256), lambda i: (i, 0))],
      out_specs=pl.BlockSpec((16, 256), lambda i: (i, 0)),
      compiler_params=plt.CompilerParams(num_warps=4),
    )(jnp.asarray(ALL_WORDS))
    np.testing.assert_array_equal(plane, dequant.nibble_plane(jnp.asarray(ALL_WORDS), p, dtype, use_asm=False))
