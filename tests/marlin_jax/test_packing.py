# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax import QuantizedTensor, pack, unpack
from marlin_jax.packing import concatenate, split
from pallas_kernels import qweight_shape


def random_tensor(rng, k, n, groups, bits=4, zeros=False, permutation=False):
  return QuantizedTensor(
    codes=jnp.asarray(rng.integers(0, 2**bits, (k, n)), jnp.uint8),
    scales=jnp.asarray(rng.normal(size=(groups, n)), jnp.bfloat16),
    zeros=jnp.asarray(rng.integers(0, 2**bits, (groups, n)), jnp.bfloat16) if zeros else None,
    permutation=jnp.asarray(rng.permutation(k), jnp.int32) if permutation else None,
    bits=bits,
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros, permutation", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("k, n, groups", [(128, 64, 1), (256, 192, 8), (96, 70, 3), (1, 1, 1)])
def test_pack_and_unpack_are_inverse_bit_for_bit(rng, k, n, groups, bits, zeros, permutation):
  tensor = random_tensor(rng, k, n, groups, bits, zeros, permutation)
  packed = jax.jit(pack)(tensor)
  assert packed.shape == (k, n) and packed.group_size == k // groups and packed.bits == bits
  assert packed.qweight.shape == qweight_shape(k, n, bits)
  assert_same(jax.jit(unpack)(packed), tensor)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("widths", [(64,), (128, 64, 64), (64, 30), (30, 64, 7)])
@pytest.mark.parametrize("zeros", [False, True])
def test_concatenated_columns_are_those_of_the_parts_and_come_apart_again(rng, bits, widths, zeros):
  parts = [random_tensor(rng, 96, n, 3, bits, zeros) for n in widths]
  whole = concatenate([pack(part) for part in parts])
  assert whole.shape == (96, sum(widths)) and whole.bits == bits
  want = np.concatenate([part.dequantize() for part in parts], axis=1)
  np.testing.assert_array_equal(unpack(whole).dequantize(), want)
  assert_same(pack(unpack(whole)), whole)  # the padding too is what packing makes
  for apart, part in zip(split(whole, widths), parts, strict=True):
    assert_same(apart, pack(part))


def test_parts_of_one_act_order_are_concatenated(rng):
  first = random_tensor(rng, 64, 64, 2, permutation=True)
  second = dataclasses.replace(random_tensor(rng, 64, 64, 2), permutation=first.permutation + 0)
  whole = concatenate([pack(first), pack(second)])
  want = np.concatenate([first.dequantize(), second.dequantize()], axis=1)
  np.testing.assert_array_equal(unpack(whole).dequantize(), want)


def test_what_does_not_belong_together_is_not_concatenated(rng):
  first = pack(random_tensor(rng, 64, 64, 2))
  for other, message in (
    (random_tensor(rng, 128, 64, 2), r"k must be the same in all tensors, not \[64, 128\]"),
    (random_tensor(rng, 64, 64, 2, bits=8), r"bits must be the same in all tensors, not \[4, 8\]"),
    (random_tensor(rng, 64, 64, 1), r"groups must be the same in all tensors, not \[2, 1\]"),
    (random_tensor(rng, 64, 64, 2, zeros=True), r"having zeros must be the same in all tensors, not \[False, True\]"),
    (random_tensor(rng, 64, 64, 2, permutation=True), "permutation must be the same in all tensors"),
  ):
    with pytest.raises(ValueError, match=message):
      concatenate([first, pack(other)])
  with pytest.raises(ValueError, match="tensors is empty"):
    concatenate([])
  with pytest.raises(ValueError, match=r"sizes=\(64, 1\) must add up to the 64 columns"):
    split(first, (64, 1))
