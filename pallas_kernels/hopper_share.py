# SPDX-License-Identifier: Apache-2.0
"""The rows of y that a warpgroup writes, and what is added to them, which is asked for before the sums are made."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.hopper_fragments import asm, constant, thread_of_warpgroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
  """What a warpgroup writes: a share of a block's rows, 64 columns of them, or 32 if they were gated.

  Attributes:
    block_m: rows of the block.
    slots, programs: sums are those of so many slots in each of so many programs; as many warpgroups share the rows.
    tile: which 64 columns of the block, whose slots follow each other, an int32 scalar.
    number: which of the equal shares this is, an int32 scalar.
    first_row, first_column: of y, where the block begins and where the columns do, int32 scalars.
    gated: y is silu(gate) * up.
  """

  block_m: int
  slots: int
  programs: int
  tile: Any
  number: Any
  first_row: Any
  first_column: Any
  gated: bool

  @property
  def rows(self) -> int:
    """Of a share."""
    return max(1, self.block_m // (self.slots * self.programs))

  @property
  def threads_a_row(self) -> int:
    """Each has eight columns."""
    return 4 if self.gated else 8

  def places(self, number, first_row, first_column, shape: tuple[int, int]):
    """(m, n, row of the block, whether it is one of the share and of y) of a thread in each pass; its place in a row.

    For an inline function, which has the three scalars as arguments.

    Args:
      shape: of y.
    """
    local, place = (
      divide(thread_of_warpgroup(), constant(self.threads_a_row)) for divide in (arith.divui, arith.remui)
    )
    n = arith.addi(first_column, arith.muli(place, constant(8)))
    passes = []
    for first in range(0, self.rows, 128 // self.threads_a_row):
      mine = arith.addi(constant(first), local) if first else local
      row = arith.addi(arith.muli(number, constant(self.rows)), mine)
      m = arith.addi(first_row, row)
      inside = arith.andi(
        arith.andi(_less(mine, self.rows), _less(row, self.block_m)), arith.andi(_less(m, shape[0]), _less(n, shape[1]))
      )
      passes.append((m, n, row, inside))
    return passes, place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addends:
  """What is added to sums and what they are multiplied with, in device memory and, where it is needed first, registers.

  Attributes:
    residual: [M, N] in y's dtype, or None.
    norm: [N] in y's dtype, with N a multiple of 64 and nothing gated; or None.
    loaded: words of each thread, those of them that there are: 4 of its first row's residual, 4 of its columns' norm.
  """

  residual: Any
  norm: Any
  loaded: Any


def load_addends(outputs, residual_gmem, norm_gmem, share: Share) -> Addends:
  """Loads that nothing waits for yet: they come from device memory, and at the end there is nothing to hide them.

  Args:
    outputs: see `write_rows`.
  """
  shape = outputs[0].shape
  refs = [ref for ref in (residual_gmem, norm_gmem) if ref is not None]
  if not refs:
    return Addends(residual=None, norm=None, loaded=None)

  def load(ctx, number, first_row, first_column, *refs):
    del ctx
    number, first_row, first_column = (scalar.registers.item() for scalar in (number, first_row, first_column))
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    (m, n, _, inside), *_ = share.places(number, first_row, first_column, shape)[0]
    elements = []
    if residual_gmem is not None:
      elements.append(element_at(m, n, shape[1]))
    if norm_gmem is not None:
      elements.append(arith.extui(i64, n))
    loaded = []
    for ref, element in zip(refs, elements, strict=True):
      there = byte_at(llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)), element, 2)
      text = (
        "{ .reg .pred p; setp.ne.s32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
        " @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
      )
      words = asm([i32] * 4, [there, arith.extui(i32, inside)], text, "=&r,=&r,=&r,=&r,l,r")
      loaded.append(vector.from_elements(ir.VectorType.get((4,), i32), words))
    registers = np.empty(len(loaded), dtype=object)
    registers[:] = loaded
    return fa.FragmentedArray(_registers=registers, _layout=fa.WGStridedFragLayout(words_shape, 4), _is_signed=True)

  words_shape = (512 * len(refs),)  # four words a thread and operand
  out = plgpu.ShapeDtypeStruct(words_shape, jnp.int32, layout=plgpu.Layout.WG_STRIDED(words_shape, vec_size=4))
  types = (plgpu.Layout.WG_SPLAT,) * 3 + (plgpu.RefType(()),) * len(refs)
  scalars = share.number, share.first_row, share.first_column
  loaded = plgpu.inline_mgpu(arg_types=types, return_type=out)(load)(*scalars, *refs)
  return Addends(residual=residual_gmem, norm=norm_gmem, loaded=loaded)


def element_at(m, n, n_end: int):
  """The number of element [m, n] of an array with n_end columns."""
  i64 = ir.IntegerType.get_signless(64)
  return arith.addi(arith.muli(arith.extui(i64, m), mgpu.c(n_end, i64)), arith.extui(i64, n))


def byte_at(base, element, size: int):
  """The address of an element of so many bytes."""
  return arith.addi(base, arith.muli(element, mgpu.c(size, ir.IntegerType.get_signless(64))))


def _less(a, b: int):
  return arith.cmpi(arith.CmpIPredicate.slt, a, constant(b))
