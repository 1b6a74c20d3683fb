# SPDX-License-Identifier: Apache-2.0
"""What is to be computed, apart from how: sizes, dtype and quantization of one matmul, and what it must cost."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.hardware import Hardware


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatmulProblem:
  """y [m, n] = x [m, k] @ w [k, n] with w in 4 or 8 bits.

  Attributes:
    m, n, k: logical sizes; m may be 0.
    group_size: consecutive k that share a scale; it divides k. k itself is one group per column.
    dtype: of x and y.
    bits: per code, 4 or 8.
    zeros: whether every group has a zero point of its own.
  """

  m: int
  n: int
  k: int
  group_size: int
  dtype: np.dtype
  bits: int = 4
  zeros: bool = False

  def __post_init__(self):
    if self.m < 0 or self.n < 1 or self.k < 1:
      raise ValueError(f"m={self.m}, n={self.n}, k={self.k}: m must be at least 0, n and k at least 1")
    if self.group_size < 1 or self.k % self.group_size:
      raise ValueError(f"group_size={self.group_size} must divide k={self.k}")
    if not jnp.issubdtype(self.dtype, jnp.floating):
      raise ValueError(f"dtype={self.dtype} must be a floating point type")
    if self.bits not in (4, 8):
      raise ValueError(f"bits={self.bits} must be 4 or 8")

  @property
  def flops(self) -> int:
    """Multiplications and additions of the product itself."""
    return 2 * self.m * self.n * self.k

  @property
  def bytes(self) -> int:
    """Bytes that must move: codes, scales, zeros and x read once, y written once."""
    codes = self.n * self.k * self.bits // 8
    scales = self.n * (self.k // self.group_size) * self.dtype.itemsize
    return codes + scales * (1 + self.zeros) + self.m * (self.n + self.k) * self.dtype.itemsize

  def time_limit(self, hardware: Hardware) -> float:
    """Seconds that no implementation can beat: the longer of moving the bytes and doing the arithmetic."""
    return max(self.bytes / hardware.bytes_per_second, self.flops / hardware.flops_per_second)
