# SPDX-License-Identifier: Apache-2.0
"""Codes <-> kernel order: pure JAX, jit-able, exact in both directions on any device."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from marlin_jax.quantized import PackedTensor, QuantizedTensor
from pallas_kernels import layout


def pack(tensor: QuantizedTensor) -> PackedTensor:
  """The same weight in kernel order; N and K are padded to whole tiles with codes of weight zero."""
  return PackedTensor(
    qweight=layout.pack_codes(tensor.codes, tensor.bits),
    scales=tensor.scales,
    zeros=tensor.zeros,
    permutation=tensor.permutation,
    k=tensor.shape[0],
  )


def unpack(tensor: PackedTensor) -> QuantizedTensor:
  """The inverse of `pack`: the same fields, bit for bit."""
  return QuantizedTensor(
    codes=layout.unpack_codes(tensor.qweight, *tensor.shape),
    scales=tensor.scales,
    zeros=tensor.zeros,
    permutation=tensor.permutation,
    bits=tensor.bits,
  )


def concatenate(tensors: Sequence[PackedTensor]) -> PackedTensor:
  """One weight [K, N1 + N2 + ...] whose columns are those of the tensors, one after the other, exactly.

  If only some have zero points, the others get theirs written out. Permutations are compared, so they must be concrete.

  Raises:
    ValueError: there are none, or they differ in k, bits, groups or permutation.
  """
  if not tensors:
    raise ValueError("tensors is empty, must hold at least one")
  first = tensors[0]
  for name, of in dict(k=lambda t: t.k, bits=lambda t: t.bits, groups=lambda t: t.scales.shape[0]).items():
    if len({of(tensor) for tensor in tensors}) > 1:
      raise ValueError(f"{name} must be the same in all tensors, not {[of(tensor) for tensor in tensors]}")
  if any(not _equal(tensor.permutation, first.permutation) for tensor in tensors):
    raise ValueError("permutation must be the same in all tensors")
  if all(tensor.shape[1] % layout.TILE == 0 for tensor in tensors[:-1]):
    qweight = jnp.concatenate([tensor.qweight for tensor in tensors])
  else:  # the padding of one would lie amid the columns of the next
    qweight = layout.pack_codes(jnp.concatenate([unpack(tensor).codes for tensor in tensors], axis=1), first.bits)
  zeros = None
  if any(tensor.zeros is not None for tensor in tensors):
    middle = layout.zero_code(first.bits)
    zeros = [jnp.full_like(t.scales, middle) if t.zeros is None else t.zeros for t in tensors]
  return PackedTensor(
    qweight=qweight,
    scales=jnp.concatenate([tensor.scales for tensor in tensors], axis=1),
    zeros=None if zeros is None else jnp.concatenate(zeros, axis=1),
    permutation=first.permutation,
    k=first.k,
  )


def _equal(a, b) -> bool:
  return a is b or (a is not None and b is not None and np.array_equal(a, b))
