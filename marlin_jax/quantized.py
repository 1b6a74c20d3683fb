# SPDX-License-Identifier: Apache-2.0
"""The forms of a quantized weight, and what was asked for.

`QuantizedTensor` holds plain codes: what quantizers make and checkpoints say. `PackedTensor` holds the same codes in
kernel order: what the matmul reads; `SparsePackedTensor` holds those of a 2:4 sparse weight, pruned codes left out.
They are types of their own so that a tensor in the wrong layout is a type error and not a wrong answer;
`marlin_jax.packing` turns one into the other.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int16, Int32, UInt8

from pallas_kernels import layout, layout24, reference

SMALLEST_GROUP = 16
# The arrays of the packed types: the names of a layer's variables too, and of the tensors in our checkpoints.
PACKED_FIELDS = ("qweight", "meta", "scales", "zeros", "permutation")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantSpec:
  """How weights are quantized: w is approximated by scales * (codes - zeros).

  Attributes:
    bits: per code, 4 or 8.
    group_size: consecutive k that share a scale: a multiple of 16, or None for one scale per column.
    symmetric: the zero point is the middle code, 2^(bits - 1), everywhere; else every group has one of its own.
    sparse24: of every four consecutive k at most two weights are not zero; 4 bits, symmetric.
  """

  bits: int = 4
  group_size: int | None = 128
  symmetric: bool = True
  sparse24: bool = False

  def __post_init__(self):
    if self.bits not in (4, 8):
      raise NotImplementedError(f"bits={self.bits} is not implemented, only 4 and 8")
    size = self.group_size
    if size is not None and (type(size) is not int or size < SMALLEST_GROUP or size % SMALLEST_GROUP):
      raise ValueError(
        f"group_size={size} must be a positive multiple of {SMALLEST_GROUP}, or None for one scale per column"
      )
    if type(self.symmetric) is not bool:
      raise ValueError(f"symmetric={self.symmetric} must be True or False")
    if type(self.sparse24) is not bool:
      raise ValueError(f"sparse24={self.sparse24} must be True or False")
    if self.sparse24 and not (self.bits == 4 and self.symmetric):
      raise NotImplementedError(
        f"sparse24 with bits={self.bits} and symmetric={self.symmetric} is not implemented, only 4 bits and symmetric"
      )

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedTensor(_CheckedPytree):
  """w[permutation[k], n] = scales[k // group_size, n] * (codes[k, n] - zeros[k // group_size, n]).

  Attributes:
    codes: uint8 [K, N], values 0 .. 2^bits - 1.
    scales: float [G, N], one row per group of K / G consecutive k; negative ones are allowed.
    zeros: float [G, N], the code of weight zero in each group, whole or not; None is 2^(bits - 1) everywhere.
    permutation: int32 [K], the input feature that row k of codes belongs to; each feature once. None is k itself. With
      it, the groups of an act-order quantizer, scattered along the features, become runs of rows.
    bits: 4 or 8.

  Raises:
    ValueError: wrong dtype or shape, or K is no multiple of G.
  """

  _static = ("bits",)

  codes: UInt8[Array, "K N"]
  scales: Float[Array, "G N"]
  zeros: Float[Array, "G N"] | None = None
  permutation: Int32[Array, " K"] | None = None
  bits: int = 4

  def __post_init__(self):
    if self.codes.dtype != jnp.uint8 or self.codes.ndim != 2:
      raise ValueError(f"codes are {self.codes.dtype} {self.codes.shape}, must be uint8 [K, N]")
    if self.bits not in (4, 8):
      raise ValueError(f"bits={self.bits} must be 4 or 8")
    _check_groups(self, *self.codes.shape)

  @property
  def shape(self) -> tuple[int, int]:
    """(K, N)."""
    return self.codes.shape

  @property
  def group_size(self) -> int:
    """Consecutive k that share a scale; K itself for one group per column."""
    return self.codes.shape[0] // self.scales.shape[0]

  @jax.jit
  def dequantize(self) -> Float32[Array, "K N"]:
    """The weight these codes stand for, rows in the order of the input features, in float32."""
    w = reference.dequantize(self.codes, self.scales, self.zeros, self.bits)
    return w if self.permutation is None else jnp.zeros_like(w).at[self.permutation].set(w, unique_indices=True)


class _PackedWeight(_CheckedPytree):
  """What all weights in kernel order are asked for; they have `scales` and `k`.

  Leading axes, the same in all arrays, make it a stack of weights, as `jax.vmap` and `jax.lax.map` return them and
  `jax.lax.scan` takes them apart; all but `stack` and `nbytes` is then of one weight.
  """

  k: int
  scales: Float[Array, "*stack G N"]

  @property
  def stack(self) -> tuple[int, ...]:
    """The leading axes; () for a single weight."""
    return self.scales.shape[:-2]

  @property
  def shape(self) -> tuple[int, int]:
    """(K, N), logical."""
    return self.k, self.scales.shape[-1]

  @property
  def groups(self) -> int:
    """Number of groups in a column."""
    return self.scales.shape[-2]

  @property
  def group_size(self) -> int:
    """Consecutive k that share a scale, pruned ones counted; K itself for one group per column."""
    return self.k // self.groups

  @property
  def nbytes(self) -> int:
    """Bytes of all fields, padding included."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTensor(_PackedWeight):
  """The weight of a `QuantizedTensor` in the order the kernels read it (pallas_kernels/layout.py).

  Attributes:
    qweight: int16 words of codes, [N/64, K/64, 8 bits, 32] with N and K padded to whole tiles.
    scales, zeros, permutation: as in `QuantizedTensor`; not padded.
    k: the logical K, which the padded words do not tell.

  Raises:
    ValueError: wrong dtype, or the buffer is not that of a [k, N] weight.
  """

  _static = ("k",)
  meta: ClassVar[None] = None

  qweight: Int16[Array, "*stack N_tiles K_tiles rows 32"]
  scales: Float[Array, "*stack G N"]
  zeros: Float[Array, "*stack G N"] | None = None
  permutation: Int32[Array, "*stack K"] | None = None
  k: int

  def __post_init__(self):
    if self.qweight.dtype != jnp.int16:
      raise ValueError(f"qweight is {self.qweight.dtype}, must be int16")
    _check_groups(self, self.k, self.scales.shape[-1], self.scales.shape[:-2])
    shapes = [(*self.stack, *layout.qweight_shape(*self.shape, bits)) for bits in (4, 8)]
    if self.qweight.shape not in shapes:
      raise ValueError(f"{self.qweight.shape=} must be one of {shapes} for a {self.shape} weight")

  @property
  def bits(self) -> int:
    """Bits of a code, 4 or 8."""
    return self.qweight.shape[-2] // 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsePackedTensor(_PackedWeight):
  """A 2:4 sparse weight of 4 bits, symmetric, in the order the kernels read it (pallas_kernels/layout24.py).

  Attributes:
    qweight: int16 words of the kept codes, two of every four along K, [N/64, K/128, 32, 32].
    meta: int16 words of their positions, [N/64, K/128, 32, 16].
    scales: as in `QuantizedTensor`.
    k: the logical K, pruned weights included.

  Raises:
    ValueError: wrong dtype, or the buffers are not those of a [k, N] weight.
  """

  _static = ("k",)
  zeros: ClassVar[None] = None
  permutation: ClassVar[None] = None

  qweight: Int16[Array, "*stack N_tiles K_tiles 32 32"]
  meta: Int16[Array, "*stack _ _ 32 16"]
  scales: Float[Array, "*stack G N"]
  k: int

  def __post_init__(self):
    _check_scales(self.scales, self.k, self.scales.shape[-1], self.scales.shape[:-2])
    for name, shape in (("qweight", layout24.qweight_shape(*self.shape)), ("meta", layout24.meta_shape(*self.shape))):
      words, shape = getattr(self, name), (*self.stack, *shape)
      if words.dtype != jnp.int16 or words.shape != shape:
        raise ValueError(f"{name} is {words.dtype} {words.shape}, must be int16 {shape} for a {self.shape} weight")

  @property
  def bits(self) -> int:
    """Bits of a code."""
    return 4


Packed = PackedTensor | SparsePackedTensor


def arrays_of(w: Packed) -> dict[str, Array]:
  """Name -> array of the fields of a packed weight, those that it has."""
  return {name: array for name in PACKED_FIELDS if (array := getattr(w, name)) is not None}


def packed_of(k: int, arrays: Mapping[str, Array]) -> Packed:
  """The inverse of `arrays_of`: 2:4 sparse if there are positions.

  Raises:
    ValueError: as the type's constructor.
  """
  return (SparsePackedTensor if "meta" in arrays else PackedTensor)(k=k, **arrays)


def _check_scales(scales, k: int, n: int, stack: tuple[int, ...]):
  if not jnp.issubdtype(scales.dtype, jnp.floating) or scales.ndim != len(stack) + 2:
    raise ValueError(f"scales are {scales.dtype} {scales.shape}, must be floating point [G, N]")
  groups, columns = scales.shape[-2:]
  if columns != n or groups < 1 or k % groups:
    raise ValueError(f"scales have shape {scales.shape}, must be [G, {n}] with a G that divides K={k}")


def _check_groups(tensor: QuantizedTensor | PackedTensor, k: int, n: int, stack: tuple[int, ...] = ()):
  scales, zeros, permutation = tensor.scales, tensor.zeros, tensor.permutation
  _check_scales(scales, k, n, stack)
  if zeros is not None and not (jnp.issubdtype(zeros.dtype, jnp.floating) and zeros.shape == scales.shape):
    raise ValueError(f"zeros are {zeros.dtype} {zeros.shape}, must be floating point {scales.shape}, as the scales")
  if permutation is not None and (permutation.dtype != jnp.int32 or permutation.shape != (*stack, k)):
    raise ValueError(f"permutation is {permutation.dtype} {permutation.shape}, must be int32 {(*stack, k)}")
