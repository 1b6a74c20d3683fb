# SPDX-License-Identifier: Apache-2.0
"""Codes <-> kernel order: jit-compiled, exact in both directions on any device."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marlin_jax.quantized import Packed, PackedTensor, QuantizedTensor, SparsePackedTensor
from pallas_kernels import layout, layout24


def pack(tensor: QuantizedTensor) -> PackedTensor:
  """The same weight in kernel order; N and K are padded to whole tiles with codes of weight zero."""
  return PackedTensor(
    qweight=layout.pack_codes(tensor.codes, tensor.bits),
    scales=tensor.scales,
    zeros=tensor.zeros,
    permutation=tensor.permutation,
    k=tensor.shape[0],
  )


def pack24(tensor: QuantizedTensor) -> SparsePackedTensor:
  """The same 2:4 sparse weight in kernel order, pruned codes left out.

  In a trace there are no values to look at: there the caller answers for the codes being 2:4.

  Raises:
    ValueError: more than two of four codes are not 8, the weight zero; names the first that is too many.
    NotImplementedError: other than 4 bits, zero points, or a permutation.
  """
  if tensor.bits != 4 or tensor.zeros is not None or tensor.permutation is not None:
    found = {"zero points": tensor.zeros is not None, "a permutation": tensor.permutation is not None}
    found = [f"{tensor.bits} bits", *(name for name, given in found.items() if given)]
    raise NotImplementedError(
      f"the weight has {' and '.join(found)}; packed as 2:4 sparse it must have 4 bits and neither zero points nor a "
      "permutation"
    )
  if not isinstance(tensor.codes, jax.core.Tracer):
    _check24(tensor.codes)
  qweight, meta = layout24.pack_codes(tensor.codes)
  return SparsePackedTensor(qweight=qweight, meta=meta, scales=tensor.scales, k=tensor.shape[0])


def _check24(codes) -> None:
  surplus = layout24.surplus(codes)
  if not surplus.any():
    return
  k, n = (int(index) for index in jnp.unravel_index(jnp.argmax(surplus), codes.shape))
  quad = k // 4 * 4
  raise ValueError(
    f"codes are not 2:4 sparse: at k={k}, n={n} stands {int(codes[k, n])}, the third of "
    f"codes[{quad}:{quad + 4}, {n}] = {codes[quad : quad + 4, n].tolist()} that is not {layout.ZERO_CODE}"
  )


def unpack(tensor: Packed) -> QuantizedTensor:
  """The inverse of `pack` and of `pack24`: the same fields, bit for bit."""
  if isinstance(tensor, SparsePackedTensor):
    codes = layout24.unpack_codes(tensor.qweight, tensor.meta, *tensor.shape)
    return QuantizedTensor(codes=codes, scales=tensor.scales)
  return QuantizedTensor(
    codes=layout.unpack_codes(tensor.qweight, *tensor.shape),
    scales=tensor.scales,
    zeros=tensor.zeros,
    permutation=tensor.permutation,
    bits=tensor.bits,
  )


def stack(tensors: Sequence[Packed]) -> Packed:
  """The weights along a new leading axis, as `jax.lax.scan` takes them apart again.

  If only some have zero points or a permutation, the others get those that change nothing.

  Raises:
    ValueError: there are none, or they differ in shape, bits, groups or in whether they are 2:4 sparse.
  """
  _check_alike(tensors, "shape", "bits", "groups", "being 2:4 sparse")
  if any(tensor.zeros is not None for tensor in tensors):
    middle = jnp.full_like(tensors[0].scales, layout.zero_code(tensors[0].bits))
    tensors = [tensor if tensor.zeros is not None else dataclasses.replace(tensor, zeros=middle) for tensor in tensors]
  if any(tensor.permutation is not None for tensor in tensors):
    order = jnp.arange(tensors[0].k, dtype=jnp.int32)
    tensors = [t if t.permutation is not None else dataclasses.replace(t, permutation=order) for t in tensors]
  return jax.tree.map(lambda *arrays: jnp.stack(arrays), *tensors)


def unstack(tensor: Packed) -> list[Packed]:
  """The inverse of `stack`; a single weight is alone in its list."""
  if not tensor.stack:
    return [tensor]
  return [jax.tree.map(lambda array, i=i: array[i], tensor) for i in range(tensor.stack[0])]


def concatenate(tensors: Sequence[Packed]) -> Packed:
  """One weight [K, N1 + N2 + ...] whose columns are those of the tensors, one after the other, exactly.

  Stacks give the stack of such weights. Permutations are compared, so they must be concrete.

  Raises:
    ValueError: there are none, or they differ in k, bits, groups, permutation, in whether they are 2:4 sparse or have
      zero points.
  """
  _check_alike(tensors, "k", "bits", "groups", "stack", "being 2:4 sparse", "having zeros")
  if any(not _equal(tensor.permutation, tensors[0].permutation) for tensor in tensors):
    raise ValueError("permutation must be the same in all tensors")
  return _for_each_of(tensors[0].stack, _concatenate)(tensors)


def _concatenate(tensors: Sequence[Packed]) -> Packed:
  first = tensors[0]
  names = ("scales",) if first.zeros is None else ("scales", "zeros")
  groups = {name: jnp.concatenate([getattr(tensor, name) for tensor in tensors], axis=1) for name in names}
  if all(tensor.shape[1] % layout.TILE == 0 for tensor in tensors[:-1]):
    words = {name: jnp.concatenate([getattr(tensor, name) for tensor in tensors]) for name in _words(first)}
    return dataclasses.replace(first, **words, **groups)
  # The padding of one would lie amid the columns of the next.
  parts = [unpack(tensor) for tensor in tensors]
  whole = dataclasses.replace(parts[0], codes=jnp.concatenate([part.codes for part in parts], axis=1), **groups)
  return _pack_as(first, whole)


def split(tensor: Packed, sizes: Sequence[int]) -> list[Packed]:
  """The inverse of `concatenate`: weights of `sizes` columns, which add up to the tensor's; stacks of a stack.

  Raises:
    ValueError: they do not add up to N.
  """
  if sum(sizes) != tensor.shape[1]:
    raise ValueError(f"{sizes=} must add up to the {tensor.shape[1]} columns of the tensor")
  return _for_each_of(tensor.stack, partial(_split, sizes=sizes))(tensor)


def interleave(gate: Packed, up: Packed) -> Packed:
  """The weight of both, for a product that is gated: eight columns of one and eight of the other, in turns, exactly.

  Raises:
    ValueError: as `concatenate`, or N is no multiple of 8.
  """
  whole = concatenate([gate, up])
  return _take_columns(whole, layout.gated_order(whole.shape[1]))


def deinterleave(tensor: Packed) -> tuple[Packed, Packed]:
  """The inverse of `interleave`."""
  n = tensor.shape[1]
  gate, up = split(_take_columns(tensor, np.argsort(layout.gated_order(n))), (n // 2, n // 2))
  return gate, up


@jax.jit
def _take_columns(tensor: Packed, order: Any) -> Packed:
  def take(tensor: Packed) -> Packed:
    whole = unpack(tensor)
    names = ("codes", "scales") if tensor.zeros is None else ("codes", "scales", "zeros")
    columns = {name: getattr(whole, name)[:, order] for name in names}
    return _pack_as(tensor, dataclasses.replace(whole, **columns))

  return _for_each_of(tensor.stack, take)(tensor)


def _split(tensor: Packed, sizes: Sequence[int]) -> list[Packed]:
  whole = None if all(size % layout.TILE == 0 for size in sizes[:-1]) else unpack(tensor)
  parts, start = [], 0
  for size in sizes:
    columns = slice(start, start + size)
    names = ("scales",) if tensor.zeros is None else ("scales", "zeros")
    groups = {name: getattr(tensor, name)[:, columns] for name in names}
    if whole is None:
      tiles = slice(start // layout.TILE, -(-columns.stop // layout.TILE))
      words = {name: getattr(tensor, name)[tiles] for name in _words(tensor)}
      parts.append(dataclasses.replace(tensor, **words, **groups))
    else:
      parts.append(_pack_as(tensor, dataclasses.replace(whole, codes=whole.codes[:, columns], **groups)))
    start += size
  return parts


def _for_each_of(stack: tuple[int, ...], function: Callable) -> Callable:
  """The function, of single weights, on stacks of them."""
  for _ in stack:
    function = jax.vmap(function)
  return function


_PROPERTIES: dict[str, Callable[[Packed], Any]] = {
  "being 2:4 sparse": lambda tensor: isinstance(tensor, SparsePackedTensor),
  "having zeros": lambda tensor: tensor.zeros is not None,
}


def _check_alike(tensors: Sequence[Packed], *names: str) -> None:
  """ValueError if there are no tensors, or they differ in one of these properties."""
  if not tensors:
    raise ValueError("tensors is empty, must hold at least one")
  for name in names:
    found = [_PROPERTIES.get(name, attrgetter(name))(tensor) for tensor in tensors]
    if len(set(found)) > 1:
      raise ValueError(f"{name} must be the same in all tensors, not {found}")


def _words(tensor: Packed) -> tuple[str, ...]:
  """The fields that have a row of tiles for every 64 columns."""
  return ("qweight", "meta") if isinstance(tensor, SparsePackedTensor) else ("qweight",)


def _pack_as(like: Packed, tensor: QuantizedTensor) -> Packed:
  return pack24(tensor) if isinstance(like, SparsePackedTensor) else pack(tensor)


def _equal(a, b) -> bool:
  return a is b or (a is not None and b is not None and np.array_equal(a, b))
