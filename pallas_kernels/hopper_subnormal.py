# SPDX-License-Identifier: Apache-2.0
"""Codes as subnormal numbers: all that is left of decoding is a mask, and nothing is subtracted from a weight.

    half of a word      d c b a     four codes
    & 0x000F                  a     as bfloat16: a * 2**-133
    & 0x00F0                b 0     16 b * 2**-133
    the word >> 8, as above         c and d

A bfloat16 whose exponent is 0 or 1 is its bits times 2**-133, and tensor cores take it as it is. b and d are of rows 8
to 15 of every 16 columns of the fragment, so whole columns are 16 times too large. The product that wrote x has left it
times 2**64, which keeps x * code within the normal numbers of float32, and the negative sums of x that zero points are
multiplied with, once a group (hopper_row_sums.py):

    sum over g of s[g, n] * (sum over k in g of x[m, k] * code[k, n]  -  zero[g, n] * (sum over k in g of x[m, k]))

A tile takes 20 instructions of a thread instead of 44.
"""

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

RAISED_X = 2.0**64  # what x is multiplied by; it must be less than 2**63, and numbers below 2**-57 lose bits
LOWERED = 2.0**-69  # and what products are, then
_CONTRACT = arith.FastMathFlags.contract
_ODD = 16  # what columns 8 to 15 are too large by

DECODE = """{ .reg .b32 t; shr.u32 t, $4, 8;
  and.b32 $0, $4, 0x000F000F; and.b32 $1, $4, 0x00F000F0; and.b32 $2, t, 0x000F000F; and.b32 $3, t, 0x00F000F0; }"""


def subtract_zeros(sums, x_sums, zeros):
  """sums[n, m] + (1 or 16) * zeros[n, m] * x_sums[m], of accumulators of a group.

  Args:
    sums: [64, block_m] float32.
    x_sums: the same shape: sums of x over the group, times -LOWERED.
    zeros: the same shape, or a number.
  """
  constant_zero = isinstance(zeros, int)

  def subtract(ctx, sums, x_sums, *others):
    del ctx
    registers = []
    for i, (total, of_x) in enumerate(zip(sums.registers.flat, x_sums.registers.flat, strict=True)):
      factor = _ODD if i % 2 else 1
      if constant_zero:
        product = arith.mulf(of_x, _pair(factor * zeros), fastmath=_CONTRACT)
      else:
        product = arith.mulf(of_x, arith.mulf(others[0].registers.flat[i], _pair(factor)), fastmath=_CONTRACT)
      registers.append(arith.addf(total, product, fastmath=_CONTRACT))
    return _like(sums, registers)

  operands = (sums, x_sums) if constant_zero else (sums, x_sums, zeros)
  return _of_accumulators(subtract, *operands)


def restore(acc):
  """acc / LOWERED, and the odd columns of it / 16."""

  def multiply(ctx, acc):
    del ctx
    return _like(
      acc,
      [arith.mulf(pair, _pair(1 / LOWERED / (_ODD if i % 2 else 1))) for i, pair in enumerate(acc.registers.flat)],
    )

  return _of_accumulators(multiply, acc)


def _of_accumulators(function, *operands):
  first = operands[0]
  out = plgpu.ShapeDtypeStruct(first.shape, first.dtype, layout=plgpu.Layout.WGMMA)
  return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,) * len(operands), return_type=out)(function)(*operands)


def _pair(value: int | float):
  """A constant for the two elements of a register; registers of an accumulator alternate between n and n + 8."""
  return vector.broadcast(ir.VectorType.get((2,), ir.F32Type.get()), mgpu.c(float(value), ir.F32Type.get()))


def _like(array, registers):
  of_array = np.empty(array.registers.shape, dtype=object)
  of_array.flat[:] = registers
  return fa.FragmentedArray(_registers=of_array, _layout=array.layout, _is_signed=None)
