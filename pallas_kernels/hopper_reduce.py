# SPDX-License-Identifier: Apache-2.0
"""From accumulators to y: partial sums of a block meet in shared memory, across a cluster if need be, in one order.

    warpgroup (n, j) of program r   store_partial: its 64 x block_m sums, transposed, to its slot of y_smem
    all that share the columns      a barrier
    warpgroup (n, j) of program r   write_rows: its share of the block's rows, slot 0 + slot 1 + ... of program 0, then
                                    those of program 1 (distributed shared memory), rounded once, to y in device memory

Columns that are gated (layout.py) become half as many: silu(gate) * up, of float32 sums; where there is nothing to add,
before they are stored, since a thread has the sums of both.

Nothing goes through device memory but y itself, no second kernel runs, and the order of additions never changes.
"""

import functools

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels import layout
from pallas_kernels.hopper_fragments import asm, asm_void, constant, thread_of_warpgroup

# Row pitch of a slot, for elements of 2 and of 4 bytes: rows are multiples of 16 bytes, and those that a warp writes at
# a time lie in different banks.
PITCH = {2: layout.TILE + 8, 4: layout.TILE + 4}
# Of shared memory alone (PTX ISA 8.6, CUDA 12.7). `fence.acq_rel.cluster` orders device memory as well: MEMBAR.ALL.GPU
# and an invalidated L1, twice a program.
_RELEASE = "fence.release.sync_restrict::shared::cta.cluster;"
_ACQUIRE = "fence.acquire.sync_restrict::shared::cluster.cluster;"


def store_partial(acc, y_smem, *, across_programs: bool, gated: bool):
  """y_smem[m, n] = acc[n, m]; once it returns, the warpgroup's sums may be read after a barrier.

  Args:
    acc: float32, [64, block_m] as an accumulator; rounded to the dtype of y_smem.
    y_smem: [block_m, PITCH], the warpgroup's slot.
    across_programs: whether other programs of the cluster read it, too.
    gated: store silu(gate) * up, 32 columns.
  """

  def store(ctx, acc, y_ref):
    del ctx
    index = ir.IndexType.get()
    thread = arith.index_cast(index, thread_of_warpgroup())
    lane = arith.remui(thread, mgpu.c(32, index))
    # A thread has sums of row n and of row n + 8; if gated, a gate and its up.
    tile_rows = 8 if gated else 16  # of a warp
    row = arith.addi(
      arith.muli(arith.divui(thread, mgpu.c(32, index)), mgpu.c(tile_rows, index)), arith.divui(lane, mgpu.c(4, index))
    )
    column = arith.muli(arith.remui(lane, mgpu.c(4, index)), mgpu.c(2, index))
    dtype = ir.MemRefType(y_ref.type).element_type
    pairs = list(acc.registers.flat)
    for i in range(len(pairs) // 2):
      for e in range(2):
        m = arith.addi(column, mgpu.c(8 * i + e, index))
        low, high = (vector.extract(pair, [], [e]) for pair in pairs[2 * i : 2 * i + 2])
        for j, value in enumerate([_silu_times(low, high)] if gated else [low, high]):
          value = value if dtype == value.type else arith.truncf(dtype, value)
          memref.store(value, y_ref, [m, arith.addi(row, mgpu.c(8 * j, index))])
    if across_programs:
      asm_void(_RELEASE)
    mgpu.utils.warpgroup_barrier()  # one thread arrives on the barrier for all

  plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(())))(store)(acc, y_smem)


def write_rows(
  y_smem, outputs, residual_gmem, norm_gmem, *, slot, share, first_row, first_column, slots, programs, gated: bool
):
  """y[first_row + m, first_column + n] = sum over programs and slots of y_smem[slot + i][m, n], for a share of m.

  If gated, with half the columns: silu(gate) * up of the sums. A residual is added to that. With a norm to come, also
  scaled = y * norm and squares[first_column / 64, first_row + m] = sum of y^2 over 64 columns, of y before it is
  rounded.

  Args:
    y_smem: [all slots, block_m, PITCH]; float32, or y's dtype where there is nothing to add.
    outputs: y [M, N] with N a multiple of 8; what lies beyond M and N is not written. With norm_gmem also scaled, like
      y, and squares [N / 64, M] in float32.
    residual_gmem: [M, N] in y's dtype, or None.
    norm_gmem: [N] in y's dtype, with N a multiple of 64 and nothing gated; or None.
    slot: the first of the `slots` slots to add in every program, an int32 scalar.
    share: which of the slots * programs equal shares of the rows, an int32 scalar.
  """
  block_m, pitch = y_smem.shape[1:]
  shares = slots * programs
  rows = max(1, block_m // shares)
  reducing = shares > 1
  threads_a_row = 4 if gated else 8  # which have 8 columns of y each
  rows_a_pass = 128 // threads_a_row
  width = 16 if gated and reducing else 8  # columns of sums for these
  convert = f"cvt.rn.{'bf16x2' if outputs[0].dtype == jnp.bfloat16 else 'f16x2'}.f32 $0, $1, $2;"

  def write(ctx, y_ref, slot, share, first_row, first_column, *refs):
    del ctx
    slot, share, first_row, first_column = (
      scalar.registers.item() for scalar in (slot, share, first_row, first_column)
    )
    f32, i32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    pair = ir.VectorType.get((2,), ir.MemRefType(refs[0].type).element_type)
    m_end, n_end = ir.MemRefType(refs[0].type).shape
    gmem = [llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)) for ref in refs]
    residual = None if residual_gmem is None else gmem[len(outputs)]
    if programs > 1:
      asm_void(_ACQUIRE)
    local, place = (divide(thread_of_warpgroup(), constant(threads_a_row)) for divide in (arith.divui, arith.remui))
    smem = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(y_ref))
    n = arith.addi(first_column, arith.muli(place, constant(8)))

    def address(slot, row):
      column = arith.muli(place, constant(width))
      element = arith.addi(arith.muli(arith.addi(arith.muli(slot, constant(block_m)), row), constant(pitch)), column)
      return arith.addi(smem, arith.muli(element, constant(4 if reducing else 2)))

    def load(slot, row, program):
      """`width` float32 from the same place of another program's shared memory."""
      values = []
      for offset in range(0, 4 * width, 16):
        text = (
          "{ .reg .b32 there; mapa.shared::cluster.u32 there, $4, $5;"
          f" ld.shared::cluster.v4.f32 {{$0, $1, $2, $3}}, [there + {offset}]; }}"
        )
        values += asm([f32] * 4, [address(slot, row), constant(program)], text, "=f,=f,=f,=f,r,r")
      return values

    def load_words(base, element):
      """Eight 16-bit floats of device memory, as words of two."""
      there = arith.addi(base, arith.muli(element, mgpu.c(2, i64)))
      return asm([i32] * 4, [there], "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l")

    def store(base, element, values):
      words = [asm([i32], [values[i + 1], values[i]], convert, "=r,f,f")[0] for i in range(0, 8, 2)]
      there = arith.addi(base, arith.muli(element, mgpu.c(2, i64)))
      asm_void("st.global.v4.b32 [$0], {$1, $2, $3, $4};", [there, *words], "l,r,r,r,r")

    def floats(words):
      vectors = [mgpu.utils.bitcast(word, pair) for word in words]
      return [arith.extf(f32, vector.extract(v, [], [e])) for v in vectors for e in range(2)]

    def add(a, b):
      return [arith.addf(x, y) for x, y in zip(a, b, strict=True)]

    def multiply(a, b):
      return [arith.mulf(x, y) for x, y in zip(a, b, strict=True)]

    if norm_gmem is not None:
      norm = floats(load_words(gmem[-1], arith.extui(i64, arith.minui(n, constant(n_end - 8)))))
      # Eight threads have a row, and are all inside or all outside.
      text = "{ .reg .b32 lane; mov.u32 lane, %laneid; and.b32 lane, lane, 24; shl.b32 $0, 255, lane; }"
      same_row = asm([i32], [], text, "=r")[0]
    for first in range(0, rows, rows_a_pass):
      mine = arith.addi(constant(first), local)
      row = arith.addi(arith.muli(share, constant(rows)), mine)
      m = arith.addi(first_row, row)
      inside = arith.andi(
        arith.andi(_less(mine, rows), _less(row, block_m)), arith.andi(_less(m, m_end), _less(n, n_end))
      )
      with mgpu.utils.when(inside):
        element = arith.addi(arith.muli(arith.extui(i64, m), mgpu.c(n_end, i64)), arith.extui(i64, n))
        if residual is not None:  # first of all: it takes longest
          addends = load_words(residual, element)
        if reducing:
          total = None
          for program in range(programs):
            for i in range(slots):
              values = load(arith.addi(slot, constant(i)), row, program)
              total = values if total is None else add(total, values)
          if gated:
            total = [_silu_times(gate, up) for gate, up in zip(total[:8], total[8:], strict=True)]
        else:
          words = asm([i32] * 4, [address(slot, row)], "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r")
          total = floats(words)
        if residual is not None:
          total = add(total, floats(addends))
        store(gmem[0], element, total)
        if norm_gmem is not None:
          store(gmem[1], element, multiply(total, norm))
          square = functools.reduce(arith.addf, multiply(total, total))
          for distance in (1, 2, 4):
            exchange = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, $2;"
            square = arith.addf(square, asm([f32], [square, same_row], exchange, "=f,f,r")[0])
          with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, place, constant(0))):
            tile = arith.divui(first_column, constant(layout.TILE))
            there = arith.extui(i64, arith.addi(arith.muli(tile, constant(m_end)), m))
            there = arith.addi(gmem[2], arith.muli(there, mgpu.c(4, i64)))
            asm_void("st.global.f32 [$0], $1;", [there, square], "l,f")
    if programs > 1:
      mgpu.utils.warpgroup_barrier()  # one thread tells the cluster that all of them have read

  refs = (*outputs, *(ref for ref in (residual_gmem, norm_gmem) if ref is not None))
  types = (plgpu.RefType(()),) + (plgpu.Layout.WG_SPLAT,) * 4 + (plgpu.RefType(()),) * len(refs)
  plgpu.inline_mgpu(arg_types=types)(write)(y_smem, slot, share, first_row, first_column, *refs)


def _silu_times(gate, up):
  """gate / (1 + exp(-gate)) * up, of float32, off by a few units in the last place."""
  text = (
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"  # -log2(e), 1
    " rcp.approx.ftz.f32 t, t; mul.f32 t, t, $1; mul.f32 $0, t, $2; }"
  )
  return asm([ir.F32Type.get()], [gate, up], text, "=f,f,f")[0]


def _less(a, b: int):
  return arith.cmpi(arith.CmpIPredicate.slt, a, constant(b))
