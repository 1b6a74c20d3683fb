# SPDX-License-Identifier: Apache-2.0
"""Sums of x over groups of k, beside the product: what zero points are multiplied with once a group.

    sum over k of x[m, k] * (code[k, n] - zero[n])  =  sum of x[m, k] * code[k, n]  -  zero[n] * (sum of x[m, k])

The first sum is the matrix product without a subtraction a weight; the second is the same for all columns (Jacob et
al., arXiv 1712.05877, section 2.3).
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import layout
from pallas_kernels.hopper_fragments import X_TRANSFORMS, asm, asm_void, constant, pair_literal, thread_of_warpgroup

_ROW = layout.TILE * 2  # bytes of a row of x in shared memory, of which eight lie below each other in a swizzled block


def negative_row_sums(x_smem, sums_smem, stage):
  """sums_smem[stage, segment, m] = -(sum of x_smem[stage, m, k] over the k of the segment), exact up to float32.

  A product with a matrix of -1, by mma.m16n8k16: two instructions for 16 x 16 values, and every column is the sum.
  Warps take turns at the segments. Once it returns, the sums may be read after a barrier.

  Args:
    x_smem: [stages, block_m, block_k] of 16-bit floats, with X_TRANSFORMS.
    sums_smem: [stages, segments, block_m] float32; the segments divide block_k equally.
    stage: an int32 scalar.
  """
  _, block_m, block_k = x_smem.shape
  _, segments, _ = sums_smem.shape
  length = block_k // segments
  kind = "bf16" if x_smem.dtype == jnp.bfloat16 else "f16"
  minus_ones = pair_literal(-1, x_smem.dtype)
  # ldmatrix reads four 8 x 8 matrices. Of 16 rows: the upper and lower half of 8 k, then of the next 8. Where there are
  # 8 rows, 32 k of them: the instruction takes every second matrix for rows 8 to 15, and both halves are added.
  rows, k_step = (16, 16) if block_m > 8 else (8, 32)
  multiply = (
    f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
    f"{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{ones, ones}}, {{$8, $9, $10, $11}};"
  )

  def write(ctx, x_ref, sums_ref, stage):
    del ctx
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    stage = stage.registers.item()

    def address(ref, nbytes_a_stage):
      base = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref))
      return arith.addi(base, arith.muli(stage, constant(nbytes_a_stage)))

    thread = thread_of_warpgroup()
    warp, lane = arith.divui(thread, constant(32)), arith.remui(thread, constant(32))
    matrix, row = arith.divui(lane, constant(8)), arith.remui(lane, constant(8))  # whose row this lane points at
    block_bytes = block_k // layout.TILE * 8 * _ROW  # eight rows of x
    x = arith.addi(address(x_ref, block_m * block_k * 2), arith.muli(row, constant(_ROW)))
    if rows == 16:
      x = arith.addi(x, arith.muli(arith.remui(matrix, constant(2)), constant(block_bytes)))
      piece = arith.divui(matrix, constant(2))
    else:
      piece = matrix

    def sum_segment(block, segment):
      total = [mgpu.c(0.0, f32)] * 4
      for k in range(segment * length, (segment + 1) * length, k_step):
        # The 16-byte pieces of a row are swizzled: piece i lies at i ^ row.
        swizzled = arith.xori(arith.addi(piece, constant(k % layout.TILE // 8)), row)
        start = block * (rows // 8) * block_bytes + k // layout.TILE * 8 * _ROW
        source = arith.addi(x, arith.addi(arith.muli(swizzled, constant(16)), constant(start)))
        load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
        a = asm([i32] * 4, [source], load, "=r,=r,=r,=r,r")
        text = f"{{ .reg .b32 ones; mov.b32 ones, {minus_ones}; {multiply} }}"
        total = asm([f32] * 4, [*a, *total], text, "=f,=f,=f,=f,r,r,r,r,f,f,f,f")
      # Lane 4 i holds rows i and i + 8 of the sums.
      with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane, constant(4)), constant(0))):
        m = arith.addi(arith.divui(lane, constant(4)), constant(segment * block_m + block * rows))
        out = arith.addi(address(sums_ref, segments * block_m * 4), arith.muli(m, constant(4)))
        if rows == 16:
          asm_void("st.shared.f32 [$0], $1; st.shared.f32 [$0 + 32], $2;", [out, total[0], total[2]], "r,f,f")
        else:
          asm_void("st.shared.f32 [$0], $1;", [out, arith.addf(total[0], total[2])], "r,f")

    parts = [(block, segment) for block in range(block_m // rows) for segment in range(segments)]
    for i, part in enumerate(parts):
      with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, warp, constant(i % 4))):
        sum_segment(*part)
    mgpu.utils.warpgroup_barrier()  # one thread arrives on the barrier for all

  types = (plgpu.RefType(X_TRANSFORMS), plgpu.RefType(()), plgpu.Layout.WG_SPLAT)
  plgpu.inline_mgpu(arg_types=types)(write)(x_smem, sums_smem, stage)
