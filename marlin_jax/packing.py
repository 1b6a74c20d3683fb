# SPDX-License-Identifier: Apache-2.0
"""Codes <-> kernel order: pure JAX, jit-able, exact in both directions on any device."""

import dataclasses
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

  Permutations are compared, so they must be concrete.

  Raises:
    ValueError: there are none, or they differ in k, bits, groups, permutation or in whether they have zero points.
  """
  if not tensors:
    raise ValueError("tensors is empty, must hold at least one")
  first = tensors[0]
  for name, of in {
    "k": lambda t: t.k,
    "bits": lambda t: t.bits,
    "groups": lambda t: t.scales.shape[0],
    "having zeros": lambda t: t.zeros is not None,
  }.items():
    if len({of(tensor) for tensor in tensors}) > 1:
      raise ValueError(f"{name} must be the same in all tensors, not {[of(tensor) for tensor in tensors]}")
  if any(not _equal(tensor.permutation, first.permutation) for tensor in tensors):
    raise ValueError("permutation must be the same in all tensors")
  if all(tensor.shape[1] % layout.TILE == 0 for tensor in tensors[:-1]):
    qweight = jnp.concatenate([tensor.qweight for tensor in tensors])
  else:  # the padding of one would lie amid the columns of the next
    qweight = layout.pack_codes(jnp.concatenate([unpack(tensor).codes for tensor in tensors], axis=1), first.bits)
  return PackedTensor(
    qweight=qweight,
    scales=jnp.concatenate([tensor.scales for tensor in tensors], axis=1),
    zeros=None if first.zeros is None else jnp.concatenate([tensor.zeros for tensor in tensors], axis=1),
    permutation=first.permutation,
    k=first.k,
  )


def split(tensor: PackedTensor, sizes: Sequence[int]) -> list[PackedTensor]:
  """The inverse of `concatenate`: weights of `sizes` columns, which add up to the tensor's.

  Raises:
    ValueError: they do not add up to N.
  """
  if sum(sizes) != tensor.shape[1]:
    raise ValueError(f"{sizes=} must add up to the {tensor.shape[1]} columns of the tensor")
  codes = None if all(size % layout.TILE == 0 for size in sizes[:-1]) else unpack(tensor).codes
  parts, start = [], 0
  for size in sizes:
    columns = slice(start, start + size)
    if codes is None:
      qweight = tensor.qweight[start // layout.TILE : -(-columns.stop // layout.TILE)]
    else:
      qweight = layout.pack_codes(codes[:, columns], tensor.bits)
    zeros = None if tensor.zeros is None else tensor.zeros[:, columns]
    parts.append(dataclasses.replace(tensor, qweight=qweight, scales=tensor.scales[:, columns], zeros=zeros))
    start += size
  return parts


def _equal(a, b) -> bool:
  return a is b or (a is not None and b is not None and np.array_equal(a, b))
