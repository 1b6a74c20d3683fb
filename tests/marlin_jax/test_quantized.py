# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax import PackedTensor, QuantizedTensor, QuantSpec, SparsePackedTensor, pack, pack24

CODES = jnp.zeros((128, 64), jnp.uint8)
WORDS = jnp.zeros((1, 2, 32, 32), jnp.int16)
META = jnp.full((1, 2, 32, 16), 0x4444, jnp.int16)


@pytest.mark.parametrize("group_size, groups", [(32, 8), (64, 4), (128, 2), (None, 1)])
def test_spec_counts_groups(group_size, groups):
  assert QuantSpec(group_size=group_size).groups(256) == groups


@pytest.mark.parametrize(
  "change, error, message",
  [
    (dict(bits=3), NotImplementedError, "bits=3 is not implemented"),
    (dict(group_size=-1), ValueError, "group_size=-1 must be a positive multiple of 16"),
    (dict(group_size=8), ValueError, "group_size=8 must be a positive multiple of 16"),
    (dict(group_size=40), ValueError, "group_size=40 must be a positive multiple of 16"),
    (dict(sparse24=True, bits=8), NotImplementedError, "sparse24 with bits=8 and symmetric=True is not implemented"),
    (dict(sparse24=True, symmetric=False), NotImplementedError, "sparse24 with bits=4 and symmetric=False is not"),
  ],
)
def test_spec_refuses_what_it_does_not_know(change, error, message):
  with pytest.raises(error, match=message):
    QuantSpec(**change)


def test_spec_refuses_a_k_that_groups_do_not_divide():
  with pytest.raises(ValueError, match="group_size=64 does not divide k=96"):
    QuantSpec(group_size=64).groups(96)


@pytest.mark.parametrize("bits, middle", [(4, 8), (8, 128)])
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("with_permutation", [False, True])
def test_dequantize_is_scale_times_code_minus_zero(rng, bits, middle, with_zeros, with_permutation):
  codes, scales = rng.integers(0, 2**bits, (64, 5)).astype(np.uint8), rng.normal(size=(2, 5)).astype(np.float32)
  zeros = rng.uniform(0, 2**bits, (2, 5)).astype(np.float32) if with_zeros else None
  order = rng.permutation(64).astype(np.int32) if with_permutation else None
  tensor = QuantizedTensor(
    codes=jnp.asarray(codes),
    scales=jnp.asarray(scales),
    zeros=None if zeros is None else jnp.asarray(zeros),
    permutation=None if order is None else jnp.asarray(order),
    bits=bits,
  )
  want = np.zeros((64, 5), np.float32)
  for k in range(64):
    zero = np.float32(middle) if zeros is None else zeros[k // 32]
    want[k if order is None else order[k]] = scales[k // 32] * (codes[k].astype(np.float32) - zero)
  np.testing.assert_array_equal(tensor.dequantize(), want)


# Under pytest the annotations of the fields are checked first; these are what users see, who run without that.
@pytest.mark.parametrize(
  "kind, fields",
  [
    (QuantizedTensor, dict(codes=CODES.astype(jnp.int16), scales=jnp.ones((1, 64)))),
    (QuantizedTensor, dict(codes=CODES, scales=jnp.ones((1, 63)))),
    (QuantizedTensor, dict(codes=CODES, scales=jnp.ones((3, 64)))),
    (QuantizedTensor, dict(codes=CODES, scales=jnp.ones((1, 64), jnp.int32))),
    (QuantizedTensor, dict(codes=CODES, scales=jnp.ones((1, 64)), bits=3)),
    (QuantizedTensor, dict(codes=CODES, scales=jnp.ones((1, 64)), zeros=jnp.ones((1, 64), jnp.int32))),
    (QuantizedTensor, dict(codes=CODES, scales=jnp.ones((1, 64)), zeros=jnp.ones((2, 64)))),
    (QuantizedTensor, dict(codes=CODES, scales=jnp.ones((1, 64)), permutation=jnp.arange(64))),
    (PackedTensor, dict(qweight=WORDS, scales=jnp.ones((1, 64)), permutation=jnp.arange(128.0), k=128)),
    (PackedTensor, dict(qweight=jnp.zeros((1, 2, 48, 32), jnp.int16), scales=jnp.ones((1, 64)), k=128)),
    (PackedTensor, dict(qweight=WORDS.astype(jnp.int32), scales=jnp.ones((1, 64)), k=128)),
    (PackedTensor, dict(qweight=WORDS, scales=jnp.ones((1, 65)), k=128)),
    (PackedTensor, dict(qweight=WORDS, scales=jnp.ones((1, 64)), k=129)),
    (PackedTensor, dict(qweight=WORDS, scales=jnp.ones((3, 64)), k=128)),
    (PackedTensor, dict(qweight=WORDS, scales=jnp.ones((2, 1, 64)), k=128)),
    (PackedTensor, dict(qweight=WORDS[None], scales=jnp.ones((1, 64)), k=128)),
    (PackedTensor, dict(qweight=WORDS[None], scales=jnp.ones((1, 1, 64)), permutation=jnp.arange(128), k=128)),
    (SparsePackedTensor, dict(qweight=WORDS, meta=META[:, :1], scales=jnp.ones((1, 64)), k=256)),
    (SparsePackedTensor, dict(qweight=WORDS, meta=META.astype(jnp.int32), scales=jnp.ones((1, 64)), k=256)),
    (SparsePackedTensor, dict(qweight=WORDS, meta=META, scales=jnp.ones((1, 64)), k=257)),
    (SparsePackedTensor, dict(qweight=WORDS, meta=META, scales=jnp.ones((1, 65)), k=256)),
    (SparsePackedTensor, dict(qweight=WORDS, meta=META, scales=jnp.ones((3, 64)), k=256)),
    (SparsePackedTensor, dict(qweight=WORDS[None], meta=META, scales=jnp.ones((1, 1, 64)), k=256)),
  ],
)
def test_wrong_fields_are_refused(kind, fields):
  with pytest.raises(ValueError, match="must be"):
    kind.__post_init__(_unchecked(kind, fields))


def _unchecked(kind, fields):
  self = object.__new__(kind)
  defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
  for name, value in (defaults | fields).items():
    object.__setattr__(self, name, value)
  return self


def test_tensors_are_frozen_pytrees_that_jit_and_tree_map_rebuild():
  packed = pack(QuantizedTensor(codes=CODES, scales=jnp.ones((2, 64))))
  assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(packed)] == [
    ".qweight",
    ".scales",
  ]
  rebuilt = jax.jit(lambda t: t)(packed)
  assert isinstance(rebuilt, PackedTensor) and rebuilt.k == 128 and rebuilt.shape == (128, 64)
  assert jax.tree.map(jnp.shape, packed).scales == (2, 64)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), packed, packed)  # a scan over layers stacks them
  assert stacked.qweight.shape == (2, 1, 2, 32, 32)
  with pytest.raises(AttributeError):
    packed.k = 64


def test_a_sparse_tensor_is_a_pytree_too():
  packed = jax.jit(lambda t: t)(
    pack24(QuantizedTensor(codes=jnp.full((256, 64), 8, jnp.uint8), scales=jnp.ones((2, 64))))
  )
  assert isinstance(packed, SparsePackedTensor) and packed.shape == (256, 64) and packed.group_size == 128
  assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(packed)] == [
    ".qweight",
    ".meta",
    ".scales",
  ]
  assert jax.tree.map(lambda *leaves: jnp.stack(leaves), packed, packed).meta.shape == (2, 1, 2, 32, 16)


def test_zeros_and_permutation_are_leaves_too():
  zeros, order = jnp.full((2, 64), 7.0), jnp.arange(128, dtype=jnp.int32)[::-1]
  tensor = QuantizedTensor(codes=CODES, scales=jnp.ones((2, 64)), zeros=zeros, permutation=order, bits=8)
  packed = jax.jit(pack)(tensor)
  assert packed.bits == 8 and packed.qweight.shape == (1, 2, 64, 32)
  assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(packed)] == [
    ".qweight",
    ".scales",
    ".zeros",
    ".permutation",
  ]
  assert packed.nbytes == 128 * 64 + 2 * 4 * 2 * 64 + 4 * 128


def test_bytes_are_half_a_byte_a_weight_and_the_scales():
  packed = pack(QuantizedTensor(codes=CODES, scales=jnp.ones((1, 64), jnp.bfloat16)))
  assert packed.nbytes == 128 * 64 // 2 + 2 * 64
