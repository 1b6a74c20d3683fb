# SPDX-License-Identifier: Apache-2.0
"""A norm between two products, without a kernel of its own: what the first leaves of it, the second makes up for.

    sum over k of (s[m, k] / rms(s[m])) * g[k] * w[k, n]  =  (sum over k of (s[m, k] * g[k]) * w[k, n]) / rms(s[m])

Root mean square layer normalization, arXiv 1910.07467, equation 4. The product that makes s writes s, s * g and sums of
the squares of 64 columns each (hopper_reduce.py); the product that reads s * g divides its sums, row by row.
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper_fragments import asm, asm_void, constant, thread_of_warpgroup

_AT_ONCE = 8  # loads in flight a thread


def write_factors(squares_gmem, partial_smem, factors_smem, *, first_row, features: int, epsilon: float):
  """factors_smem[m] = 1 / sqrt(sum over t of squares_gmem[t, first_row + m] / features + epsilon).

  As many threads a row as there are, each adds up every so manieth tile; then one the parts. The order of additions
  never changes. Once it returns, the factors may be read after a barrier.

  Args:
    squares_gmem: [tiles, M] float32.
    partial_smem: [128] float32, of use in here only.
    factors_smem: [block_m] float32; those beyond M are of no use.
    first_row: an int32 scalar.
  """
  (tiles, m_end), (block_m,) = squares_gmem.shape, factors_smem.shape
  parts = 128 // block_m

  def write(ctx, squares_ref, partial_ref, factors_ref, first_row):
    del ctx
    f32, i32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)

    def address(ref, element):
      return arith.addi(llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref)), arith.muli(element, constant(4)))

    thread = thread_of_warpgroup()
    part, row = arith.divui(thread, constant(block_m)), arith.remui(thread, constant(block_m))
    m = arith.minui(arith.addi(first_row.registers.item(), row), constant(m_end - 1))
    element = arith.extui(i64, arith.addi(arith.muli(part, constant(m_end)), m))
    gmem = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(squares_ref))
    here = arith.addi(gmem, arith.muli(element, mgpu.c(4, i64)))
    total = mgpu.c(0.0, f32)
    turns = -(-tiles // parts)
    for first in range(0, turns, _AT_ONCE):
      values = []
      for turn in range(first, min(first + _AT_ONCE, turns)):
        inside = arith.cmpi(arith.CmpIPredicate.ult, part, constant(tiles - turn * parts))
        text = (
          "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.f32 $0, 0f00000000;"
          f" @p ld.global.f32 $0, [$1 + {turn * parts * m_end * 4}]; }}"
        )
        values += asm([f32], [here, arith.extui(i32, inside)], text, "=&f,l,r")
      for value in values:
        total = arith.addf(total, value)
    asm_void("st.shared.f32 [$0], $1;", [address(partial_ref, thread), total], "r,f")
    mgpu.utils.warpgroup_barrier()
    with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, constant(block_m))):
      total = mgpu.c(0.0, f32)
      for i in range(parts):
        place = address(partial_ref, arith.addi(thread, constant(i * block_m)))
        total = arith.addf(total, asm([f32], [place], "ld.shared.f32 $0, [$1];", "=f,r")[0])
      mean = arith.addf(arith.mulf(total, mgpu.c(1 / features, f32)), mgpu.c(epsilon, f32))
      factor = asm([f32], [mean], "rsqrt.approx.ftz.f32 $0, $1;", "=f,f")[0]
      asm_void("st.shared.f32 [$0], $1;", [address(factors_ref, thread), factor], "r,f")
    mgpu.utils.warpgroup_barrier()  # one thread arrives on the barrier for all

  types = (plgpu.RefType(()),) * 3 + (plgpu.Layout.WG_SPLAT,)
  plgpu.inline_mgpu(arg_types=types)(write)(squares_gmem, partial_smem, factors_smem, first_row)
