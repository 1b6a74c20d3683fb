# SPDX-License-Identifier: Apache-2.0
"""Codes <-> kernel order: pure JAX, jit-able, exact in both directions on any device."""

from marlin_jax.quantized import PackedTensor, QuantizedTensor
from pallas_kernels import layout


def pack(tensor: QuantizedTensor) -> PackedTensor:
  """The same weight in kernel order; N and K are padded to whole tiles with codes of weight zero."""
  return PackedTensor(qweight=layout.pack_codes(tensor.codes), scales=tensor.scales, k=tensor.shape[0])


def unpack(tensor: PackedTensor) -> QuantizedTensor:
  """The inverse of `pack`: the same codes and scales, bit for bit."""
  return QuantizedTensor(codes=layout.unpack_codes(tensor.qweight, *tensor.shape), scales=tensor.scales)
