# SPDX-License-Identifier: Apache-2.0
"""The two forms of a quantized weight, and what was asked for.

`QuantizedTensor` holds plain codes: what quantizers make and checkpoints say. `PackedTensor` holds the same codes in
kernel order: what the matmul reads. They are two types so that a tensor in the wrong layout is a type error and not a
wrong answer; `marlin_jax.packing` turns one into the other.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, Int16

from pallas_kernels import layout, reference

GROUP_SIZES = (32, 64, 128, None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantSpec:
  """How weights are quantized: w is approximated by scales * (codes - 8).

  Attributes:
    bits: per code; 4.
    group_size: consecutive k that share a scale: 32, 64, 128, or None for one scale per column.
  """

  bits: int = 4
  group_size: int | None = 128

  def __post_init__(self):
    if self.bits != 4:
      raise NotImplementedError(f"bits={self.bits} is not implemented, only 4")
    if self.group_size not in GROUP_SIZES:
      raise ValueError(f"group_size={self.group_size} must be one of {GROUP_SIZES} (None: one scale per column)")

  def groups(self, k: int) -> int:
    """Number of groups in a column of k weights. ValueError if the group size does not divide k."""
    if self.group_size is None:
      return 1
    if k % self.group_size:
      raise ValueError(f"group_size={self.group_size} does not divide k={k}")
    return k // self.group_size


class _CheckedPytree:
  """A frozen dataclass as a pytree: checked when a user makes it, not when JAX rebuilds it around tracers."""

  _static: tuple[str, ...] = ()
  __slots__ = ()

  def __init_subclass__(cls):
    jax.tree_util.register_pytree_with_keys_class(cls)

  def tree_flatten_with_keys(self):
    data = [f.name for f in dataclasses.fields(self) if f.name not in self._static]
    leaves = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in data]
    return leaves, tuple(getattr(self, name) for name in self._static)

  @classmethod
  def tree_unflatten(cls, static, leaves):
    self = object.__new__(cls)
    data = [f.name for f in dataclasses.fields(cls) if f.name not in cls._static]
    for name, value in zip((*data, *cls._static), (*leaves, *static), strict=True):
      object.__setattr__(self, name, value)
    return self


@dataclasses.dataclass(frozen=True)
class QuantizedTensor(_CheckedPytree):
  """w[k, n] = scales[k // group_size, n] * (codes[k, n] - 8).

  Attributes:
    codes: int8 [K, N], values 0..15; 8 is the weight zero.
    scales: float [G, N], one row per group of K / G consecutive k; negative ones are allowed.

  Raises:
    ValueError: wrong dtype or rank, or K is no multiple of G.
  """

  codes: Int8[Array, "K N"]
  scales: Float[Array, "G N"]

  def __post_init__(self):
    if self.codes.dtype != jnp.int8 or self.codes.ndim != 2:
      raise ValueError(f"codes are {self.codes.dtype} {self.codes.shape}, must be int8 [K, N]")
    _check_scales(self.scales, *self.codes.shape)

  @property
  def shape(self) -> tuple[int, int]:
    """(K, N)."""
    return self.codes.shape

  @property
  def group_size(self) -> int:
    """Consecutive k that share a scale; K itself for one group per column."""
    return self.codes.shape[0] // self.scales.shape[0]

  def dequantize(self) -> Float32[Array, "K N"]:
    """The weight these codes stand for, exact in float32."""
    return reference.dequantize(self.codes, self.scales)


@dataclasses.dataclass(frozen=True)
class PackedTensor(_CheckedPytree):
  """The weight of a `QuantizedTensor` in the order the kernels read it (pallas_kernels/layout.py).

  Attributes:
    qweight: int16 words of four codes, [N/64, K/64, 32, 32] with N and K padded to whole tiles.
    scales: float [G, N], not padded.
    k: the logical K, which the padded words do not tell.

  Raises:
    ValueError: wrong dtype, or the buffer is not that of a [k, N] weight.
  """

  _static = ("k",)

  qweight: Int16[Array, "N_tiles K_tiles 32 32"]
  scales: Float[Array, "G N"]
  k: int

  def __post_init__(self):
    if self.qweight.dtype != jnp.int16:
      raise ValueError(f"qweight is {self.qweight.dtype}, must be int16")
    _check_scales(self.scales, self.k, self.scales.shape[-1])
    if self.qweight.shape != layout.qweight_shape(*self.shape):
      raise ValueError(f"{self.qweight.shape=} must be {layout.qweight_shape(*self.shape)} for a {self.shape} weight")

  @property
  def shape(self) -> tuple[int, int]:
    """(K, N), logical."""
    return self.k, self.scales.shape[1]

  @property
  def group_size(self) -> int:
    """Consecutive k that share a scale; K itself for one group per column."""
    return self.k // self.scales.shape[0]

  @property
  def nbytes(self) -> int:
    """Bytes of codes and scales, padding included."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in (self.qweight, self.scales))


def _check_scales(scales, k: int, n: int):
  if not jnp.issubdtype(scales.dtype, jnp.floating) or scales.ndim != 2:
    raise ValueError(f"scales are {scales.dtype} {scales.shape}, must be floating point [G, N]")
  groups, columns = scales.shape
  if columns != n or groups < 1 or k % groups:
    raise ValueError(f"scales have shape {scales.shape}, must be [G, {n}] with a G that divides K={k}")
