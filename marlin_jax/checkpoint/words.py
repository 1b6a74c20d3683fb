# SPDX-License-Identifier: Apache-2.0
"""Codes in the 32-bit words of other tools, and from there into kernel order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from marlin_jax.packing import pack
from marlin_jax.quantized import PackedTensor, QuantizedTensor
from pallas_kernels.layout import zero_code


def unpack_words(words, axis: int, bits: int = 4):
  """uint8 codes of int32 words, 32 / bits to a word along `axis`, the first in the lowest bits; for numpy and JAX."""
  shifts = np.arange(0, 32, bits, dtype=np.int32).reshape(-1, *(1,) * (words.ndim - 1 - axis))
  fields = words.reshape(*words.shape[: axis + 1], 1, *words.shape[axis + 1 :]) >> shifts & (1 << bits) - 1
  return fields.astype(np.uint8).reshape(*words.shape[:axis], -1, *words.shape[axis + 1 :])


def pack_words(codes, axis: int, bits: int = 4):
  """The inverse of `unpack_words`: int32 words of uint8 codes; for numpy and JAX."""
  per_word = 32 // bits
  fields = codes.reshape(*codes.shape[:axis], -1, per_word, *codes.shape[axis + 1 :]).astype(np.uint32)
  shifts = np.arange(0, 32, bits, dtype=np.uint32).reshape(-1, *(1,) * (codes.ndim - 1 - axis))
  return (fields << shifts).sum(axis + 1, dtype=np.uint32).view(np.int32)


def packed(
  codes: jax.Array, scales: jax.Array, zeros: np.ndarray | None = None, permutation: np.ndarray | None = None, bits=4
) -> PackedTensor:
  """The packed weight, where codes lie; the four arrays are a tool's own, in our orientation and in its row order.

  Args:
    codes: uint8 [K, N], row k of input feature k.
    scales: float [G, N].
    zeros: [G, N] in any numeric dtype; where all are the middle code there will be none.
    permutation: int [K], features in the order in which groups are runs of rows; None leaves the rows where they are.
    bits: 4 or 8.
  """
  if zeros is not None and (zeros == zero_code(bits)).all():
    zeros = None
  if permutation is not None:
    permutation = permutation.astype(np.int32)
  return _packed(codes, scales, zeros, permutation, bits=bits)


@partial(jax.jit, static_argnames=("bits",))
def _packed(codes, scales, zeros, permutation, *, bits) -> PackedTensor:
  if permutation is not None:
    codes = jnp.take(codes, permutation, axis=0)
  if zeros is not None:
    zeros = zeros.astype(jnp.float32).astype(scales.dtype)
  return pack(QuantizedTensor(codes=codes, scales=scales, zeros=zeros, permutation=permutation, bits=bits))
