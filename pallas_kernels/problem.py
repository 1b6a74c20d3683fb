# SPDX-License-Identifier: Apache-2.0
"""What is to be computed, apart from how: sizes, dtype and quantization of one matmul, and what it must cost."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels import layout, layout24
from pallas_kernels.hardware import Hardware


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatmulProblem:
  """y [m, n] = x [m, k] @ w [k, n] with w in 4 or 8 bits, dense or 2:4 sparse.

  Attributes:
    m, n, k: logical sizes; m may be 0.
    group_size: consecutive k that share a scale; it divides k. k itself is one group per column.
    dtype: of x and y.
    bits: per code, 4 or 8.
    zeros: whether every group has a zero point of its own.
    sparse24: whether of every four consecutive k of a column only two are stored, and their positions (layout24.py).
  """

  m: int
  n: int
  k: int
  group_size: int
  dtype: np.dtype
  bits: int = 4
  zeros: bool = False
  sparse24: bool = False

  def __post_init__(self):
    if self.m < 0 or self.n < 1 or self.k < 1:
      raise ValueError(f"m={self.m}, n={self.n}, k={self.k}: m must be at least 0, n and k at least 1")
    if self.group_size < 1 or self.k % self.group_size:
      raise ValueError(f"group_size={self.group_size} must divide k={self.k}")
    if not jnp.issubdtype(self.dtype, jnp.floating):
      raise ValueError(f"dtype={self.dtype} must be a floating point type")
    if self.bits not in (4, 8):
      raise ValueError(f"bits={self.bits} must be 4 or 8")
    if self.sparse24 and (self.bits != 4 or self.zeros):
      raise ValueError(f"bits={self.bits} and zeros={self.zeros} must be 4 and False where sparse24 is True")

  @property
  def tile_k(self) -> int:
    """k of a tile of the packed layout."""
    return layout24.K_TILE if self.sparse24 else layout.TILE

  @property
  def flops(self) -> int:
    """Multiplications and additions of the product itself, those with pruned weights left out."""
    return 2 * self.m * self.n * (self.k // 2 if self.sparse24 else self.k)

  @property
  def bytes(self) -> int:
    """Bytes that must move: codes, positions, scales, zeros and x read once, y written once."""
    # Of four sparse weights two codes of 4 bits and two positions of 2: 3 bits a weight.
    codes = self.n * self.k * (3 if self.sparse24 else self.bits) // 8
    scales = self.n * (self.k // self.group_size) * self.dtype.itemsize
    return codes + scales * (1 + self.zeros) + self.m * (self.n + self.k) * self.dtype.itemsize

  def time_limit(self, hardware: Hardware) -> float:
    """Seconds that no implementation can beat: the longer of moving the bytes and doing the arithmetic."""
    return max(self.bytes / hardware.bytes_per_second, self.flops / hardware.flops_per_second)
