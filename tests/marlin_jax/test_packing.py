# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_jax import QuantizedTensor, pack, pack24, unpack
from marlin_jax.packing import concatenate, deinterleave, interleave, split, stack, unstack
from pallas_kernels import qweight_shape
from tests.pallas_kernels.problems import sparse24_codes


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


def random_tensor24(rng, k, n, groups, density=None):
  scales = jnp.asarray(rng.normal(size=(groups, n)), jnp.bfloat16)
  return QuantizedTensor(codes=sparse24_codes(rng, k, n, density), scales=scales)


@jax.jit
def _pack24_and_unpack(tensor):
  packed = pack24(tensor)
  return packed, unpack(packed)


# Few shapes, because each is compiled anew; of one tile, of one more than a tile, and of several.
@pytest.mark.parametrize("k, n, group_size", [(16, 1, 16), (272, 65, None), (640, 140, 128)])
@settings(deadline=None, max_examples=6)
@given(density=st.sampled_from([0, 1, 2, None]), seed=st.integers(0, 999))
def test_sparse_weights_come_back_bit_for_bit(k, n, group_size, density, seed):
  groups = 1 if group_size is None else k // group_size
  tensor = random_tensor24(np.random.default_rng(seed), k, n, groups, density)
  packed, back = _pack24_and_unpack(tensor)
  assert packed.shape == (k, n) and packed.group_size == k // groups and packed.bits == 4
  assert_same(back, tensor)


def test_sparse_weights_come_back_without_jit_too(rng):
  tensor = random_tensor24(rng, 160, 70, 5)
  packed = pack24(tensor)
  assert_same(packed, jax.jit(pack24)(tensor))
  assert_same(unpack(packed), tensor)


def test_sparse_weights_take_three_quarters_of_the_bytes(rng):
  tensor = random_tensor24(rng, 512, 128, 4, 2)
  assert pack24(tensor).nbytes == 512 * 128 * 3 // 8 + 2 * 4 * 128
  assert pack(tensor).nbytes == 512 * 128 * 4 // 8 + 2 * 4 * 128


@pytest.mark.parametrize("place", [(2, 0), (130, 69), (7, 3)])
def test_a_weight_that_is_not_sparse_is_refused_with_the_place(rng, place):
  k, n = place
  codes = np.full((134, 70), 8, np.uint8)
  codes[:, 40:45] = sparse24_codes(rng, 134, 5)
  codes[k // 4 * 4 : k + 1, n] = [1, 15, 2, 3][: k % 4 + 1]
  if k % 4 == 3:
    codes[k - 1, n] = 8  # the third of the quad stands in its last place
  codes[132:, 69] = 1, 2  # two in the last, short quad are fine
  q = k // 4 * 4
  message = (
    f"codes are not 2:4 sparse: at k={k}, n={n} stands {codes[k, n]}, the third of codes[{q}:{q + 4}, {n}] = "
    f"{codes[q : q + 4, n].tolist()} that is not 8"
  )
  with pytest.raises(ValueError) as error:
    pack24(QuantizedTensor(codes=jnp.asarray(codes), scales=jnp.ones((1, 70))))
  assert str(error.value) == message


@pytest.mark.parametrize(
  "kind, found",
  [
    (dict(bits=8), "8 bits"),
    (dict(zeros=True), "4 bits and zero points"),
    (dict(permutation=True), "4 bits and a permutation"),
  ],
)
def test_only_symmetric_weights_of_four_bits_are_packed_as_sparse(rng, kind, found):
  with pytest.raises(NotImplementedError, match=f"the weight has {found}; packed as 2:4 sparse it must have 4 bits"):
    pack24(random_tensor(rng, 64, 64, 1, **kind))


@pytest.mark.parametrize("widths", [(64,), (128, 64, 30), (30, 64, 7)])
def test_sparse_weights_are_concatenated_and_come_apart_again(rng, widths):
  parts = [random_tensor24(rng, 96, n, 3) for n in widths]
  whole = concatenate([pack24(part) for part in parts])
  want = np.concatenate([part.dequantize() for part in parts], axis=1)
  np.testing.assert_array_equal(unpack(whole).dequantize(), want)
  assert_same(pack24(unpack(whole)), whole)
  for apart, part in zip(split(whole, widths), parts, strict=True):
    assert_same(apart, pack24(part))


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


@pytest.mark.parametrize("kind", [dict(), dict(bits=8, zeros=True), dict(permutation=True), "2:4 sparse"], ids=str)
def test_a_stack_holds_its_weights(rng, kind):
  if kind == "2:4 sparse":
    parts = [pack24(random_tensor24(rng, 96, 70, 3)) for _ in range(4)]
  else:
    parts = [pack(random_tensor(rng, 96, 70, 3, **kind)) for _ in range(4)]
  whole = stack(parts)
  assert (whole.stack, whole.shape, whole.group_size, whole.bits) == ((4,), (96, 70), 32, parts[0].bits)
  assert whole.nbytes == sum(part.nbytes for part in parts)
  dataclasses.replace(whole)  # which checks the shapes
  for one, part in zip(unstack(whole), parts, strict=True):
    assert_same(one, part)
  assert unstack(parts[0]) == [parts[0]]
  _, dequantized = jax.lax.scan(lambda _, one: (None, unpack(one).dequantize()), None, whole)
  np.testing.assert_array_equal(dequantized, np.stack([unpack(part).dequantize() for part in parts]))


def test_weights_with_and_without_zero_points_or_act_order_are_stacked(rng):
  parts = [random_tensor(rng, 64, 64, 2, **kind) for kind in (dict(), dict(zeros=True), dict(permutation=True))]
  whole = stack([pack(part) for part in parts])
  assert whole.zeros.shape == (3, 2, 64) and whole.permutation.shape == (3, 64)
  for one, part in zip(unstack(whole), parts, strict=True):
    np.testing.assert_array_equal(unpack(one).dequantize(), part.dequantize())


def test_weights_of_different_kinds_are_not_stacked(rng):
  first = pack(random_tensor(rng, 64, 64, 2))
  for other, message in (
    (random_tensor(rng, 64, 65, 2), r"shape must be the same in all tensors, not \[\(64, 64\), \(64, 65\)\]"),
    (random_tensor(rng, 64, 64, 2, bits=8), r"bits must be the same in all tensors, not \[4, 8\]"),
    (random_tensor(rng, 64, 64, 1), r"groups must be the same in all tensors, not \[2, 1\]"),
  ):
    with pytest.raises(ValueError, match=message):
      stack([first, pack(other)])
  with pytest.raises(ValueError, match="being 2:4 sparse must be the same"):
    stack([first, pack24(random_tensor24(rng, 64, 64, 2))])
  with pytest.raises(ValueError, match="tensors is empty"):
    stack([])


@pytest.mark.parametrize("widths", [(64, 64), (30, 64)])
@pytest.mark.parametrize("kind", [dict(), dict(bits=8, zeros=True)], ids=str)
def test_stacks_are_concatenated_one_by_one(rng, widths, kind):
  parts = [[pack(random_tensor(rng, 96, n, 3, **kind)) for _ in range(3)] for n in widths]
  stacks = [stack(of_width) for of_width in parts]
  whole = concatenate(stacks)
  for one, *columns in zip(unstack(whole), *parts, strict=True):
    assert_same(one, concatenate(columns))
  for apart, part in zip(split(whole, widths), stacks, strict=True):
    assert_same(apart, part)
  with pytest.raises(ValueError, match=r"stack must be the same in all tensors, not \[\(3,\), \(2,\)\]"):
    concatenate([stacks[0], stack(parts[1][:2])])


@pytest.mark.parametrize("kind", ["4 bits", "8 bits", "zeros", "permutation", "2:4 sparse", "stack"])
@pytest.mark.parametrize("n", [8, 72, 128])
def test_interleaved_columns_take_turns_of_eight_and_come_apart_again(rng, n, kind):
  options = dict(bits=8 if kind == "8 bits" else 4, zeros=kind == "zeros")
  if kind == "2:4 sparse":
    gate, up = (pack24(random_tensor24(rng, 128, n, 2)) for _ in range(2))
  else:
    gate, up = (pack(random_tensor(rng, 128, n, 2, **options)) for _ in range(2))
  if kind == "permutation":
    order = jnp.asarray(rng.permutation(128), jnp.int32)
    gate, up = (dataclasses.replace(tensor, permutation=order) for tensor in (gate, up))
  if kind == "stack":
    gate, up = stack([gate, up]), stack([up, gate])
  both = interleave(gate, up)
  parts = zip(*(unstack(tensor) for tensor in (both, gate, up)), strict=True)
  for whole, *halves in ([unpack(tensor).dequantize() for tensor in part] for part in parts):
    blocks = [np.asarray(half).reshape(128, -1, 8) for half in halves]
    np.testing.assert_array_equal(whole, np.stack(blocks, axis=2).reshape(128, 2 * n))
  for again, tensor in zip(deinterleave(both), (gate, up), strict=True):
    assert_same(again, tensor)


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
  with pytest.raises(ValueError, match=r"being 2:4 sparse must be the same in all tensors, not \[False, True\]"):
    concatenate([first, pack24(random_tensor24(rng, 64, 64, 2))])
  with pytest.raises(ValueError, match="tensors is empty"):
    concatenate([])
  with pytest.raises(ValueError, match=r"sizes=\(64, 1\) must add up to the 64 columns"):
    split(first, (64, 1))
