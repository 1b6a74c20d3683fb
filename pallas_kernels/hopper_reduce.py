# SPDX-License-Identifier: Apache-2.0
"""From accumulators to y: partial sums of a block meet in shared memory, across a cluster if need be, in one order.

    warpgroup (n, j) of program r   store_partial: its 64 x block_m sums, transposed, to its slot of y_smem
    all that share the columns      a barrier
    warpgroup (n, j) of program r   write_rows: its share of the block's rows, slot 0 + slot 1 + ... of program 0, then
                                    those of program 1 (distributed shared memory), rounded once, to y in device memory

Nothing goes through device memory but y itself, no second kernel runs, and the order of additions never changes.
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels import layout
from pallas_kernels.hopper_fragments import asm, asm_void

# Row pitch of a slot, for elements of 2 and of 4 bytes: rows are multiples of 16 bytes, and those that a warp writes at
# a time lie in different banks.
PITCH = {2: layout.TILE + 8, 4: layout.TILE + 4}
_ROWS_A_PASS = 16  # 128 threads, 8 columns each

# Of shared memory alone (PTX ISA 8.6). `fence.acq_rel.cluster` orders device memory as well: MEMBAR.ALL.GPU and an
# invalidated L1, twice a program.
_RELEASE = "fence.release.sync_restrict::shared::cta.cluster;"
_ACQUIRE = "fence.acquire.sync_restrict::shared::cluster.cluster;"


def store_partial(acc, y_smem, *, across_programs: bool):
  """y_smem[m, n] = acc[n, m]; once it returns, the warpgroup's sums may be read after a barrier.

  Args:
    acc: float32 or y's dtype, [64, block_m] as an accumulator.
    y_smem: [block_m, PITCH], the warpgroup's slot.
    across_programs: whether other programs of the cluster read it, too.
  """

  def store(ctx, acc, y_ref):
    del ctx
    index = ir.IndexType.get()
    thread = arith.index_cast(index, _thread())
    lane = arith.remui(thread, mgpu.c(32, index))
    row = arith.addi(
      arith.muli(arith.divui(thread, mgpu.c(32, index)), mgpu.c(16, index)), arith.divui(lane, mgpu.c(4, index))
    )
    column = arith.muli(arith.remui(lane, mgpu.c(4, index)), mgpu.c(2, index))
    for i, pair in enumerate(acc.registers.flat):
      n = arith.addi(row, mgpu.c(8 * (i % 2), index))
      for e in range(2):
        m = arith.addi(column, mgpu.c(8 * (i // 2) + e, index))
        memref.store(vector.extract(pair, [], [e]), y_ref, [m, n])
    if across_programs:
      asm_void(_RELEASE)
    mgpu.utils.warpgroup_barrier()  # one thread arrives on the barrier for all

  plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(())))(store)(acc, y_smem)


def write_rows(y_smem, y_gmem, *, slot, share, first_row, first_column, slots: int, programs: int):
  """y_gmem[first_row + m, first_column + n] = sum over programs and slots of y_smem[slot + i][m, n], for a share of m.

  Args:
    y_smem: [all slots, block_m, PITCH]; float32, or y's dtype where there is nothing to add.
    y_gmem: [M, N] with N a multiple of 8; what lies beyond M and N is not written.
    slot: the first of the `slots` slots to add in every program, an int32 scalar.
    share: which of the slots * programs equal shares of the rows, an int32 scalar.
  """
  block_m, pitch = y_smem.shape[1:]
  shares = slots * programs
  rows = max(1, block_m // shares)
  reducing = shares > 1
  convert = f"cvt.rn.{'bf16x2' if y_gmem.dtype == jnp.bfloat16 else 'f16x2'}.f32 $0, $1, $2;"

  def write(ctx, y_ref, y_out, slot, share, first_row, first_column):
    del ctx
    slot, share, first_row, first_column = (
      scalar.registers.item() for scalar in (slot, share, first_row, first_column)
    )
    f32, i32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    m_end, n_end = ir.MemRefType(y_out.type).shape
    if programs > 1:
      asm_void(_ACQUIRE)
    local, column = arith.divui(_thread(), _i32(8)), arith.muli(arith.remui(_thread(), _i32(8)), _i32(8))
    smem = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(y_ref))
    gmem = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(y_out))
    n = arith.addi(first_column, column)

    def address(slot, row):
      element = arith.addi(arith.muli(arith.addi(arith.muli(slot, _i32(block_m)), row), _i32(pitch)), column)
      return arith.addi(smem, arith.muli(element, _i32(4 if reducing else 2)))

    def load(slot, row, program):
      """Eight float32 from the same place of another program's shared memory."""
      values = []
      for offset in (0, 16):
        text = (
          "{ .reg .b32 there; mapa.shared::cluster.u32 there, $4, $5;"
          f" ld.shared::cluster.v4.f32 {{$0, $1, $2, $3}}, [there + {offset}]; }}"
        )
        values += asm([f32] * 4, [address(slot, row), _i32(program)], text, "=f,=f,=f,=f,r,r")
      return values

    for first in range(0, rows, _ROWS_A_PASS):
      mine = arith.addi(_i32(first), local)
      row = arith.addi(arith.muli(share, _i32(rows)), mine)
      m = arith.addi(first_row, row)
      inside = arith.andi(
        arith.andi(_less(mine, rows), _less(row, block_m)), arith.andi(_less(m, m_end), _less(n, n_end))
      )
      with mgpu.utils.when(inside):
        if reducing:
          total = None
          for program in range(programs):
            for i in range(slots):
              values = load(arith.addi(slot, _i32(i)), row, program)
              total = values if total is None else [arith.addf(a, b) for a, b in zip(total, values, strict=True)]
          words = [asm([i32], [total[i + 1], total[i]], convert, "=r,f,f")[0] for i in range(0, 8, 2)]
        else:
          words = asm([i32] * 4, [address(slot, row)], "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r")
        element = arith.addi(arith.muli(arith.extui(i64, m), mgpu.c(n_end, i64)), arith.extui(i64, n))
        out = arith.addi(gmem, arith.muli(element, mgpu.c(2, i64)))
        asm_void("st.global.v4.b32 [$0], {$1, $2, $3, $4};", [out, *words], "l,r,r,r,r")
    if programs > 1:
      mgpu.utils.warpgroup_barrier()  # one thread tells the cluster that all of them have read

  types = (plgpu.RefType(()), plgpu.RefType(())) + (plgpu.Layout.WG_SPLAT,) * 4
  plgpu.inline_mgpu(arg_types=types)(write)(y_smem, y_gmem, slot, share, first_row, first_column)


def _thread():
  return arith.remui(mgpu.utils.thread_idx(), _i32(128))


def _i32(value: int):
  return mgpu.c(value, ir.IntegerType.get_signless(32))


def _less(a, b: int):
  return arith.cmpi(arith.CmpIPredicate.slt, a, _i32(b))
