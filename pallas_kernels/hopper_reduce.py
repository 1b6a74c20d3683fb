# SPDX-License-Identifier: Apache-2.0
"""From accumulators to y: partial sums of a block meet in shared or device memory, in one order.

    warpgroup (n, j) of program r   load_addends: residual and norm of its share, asked for before the sums are made
    warpgroup (n, j) of program r   store_partial: its 64 x block_m sums, transposed, to its slot of y_smem
    all that share the columns      a barrier
    warpgroup (n, j) of program r   write_rows: its share of the block's rows, slot 0 + slot 1 + ... of program 0, then
                                    those of program 1 (distributed shared memory), rounded once, to y in device memory
    runs of K without a cluster     the same, but all except run 0 leave what their slots add up to in device memory,
                                    where run 0 waits for it and adds it: run 0 + run 1 + ...

Columns that are gated (layout.py) become half as many: silu(gate) * up, of float32 sums; where there is nothing to add,
before they are stored, since a thread has the sums of both.

No second kernel runs, and the order of additions never changes.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels import layout
from pallas_kernels.hopper_fragments import asm, asm_void, constant, thread_of_warpgroup
from pallas_kernels.hopper_grid import publish, wait_for
from pallas_kernels.hopper_share import Addends, Share, byte_at, element_at

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
    mgpu.utils.warpgroup_barrier()  # one thread arrives on the barrier for all
    if across_programs:  # by the thread that arrives, after the others' stores: theirs come before its arrival, too
      asm_void(_RELEASE)

  plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(())))(store)(acc, y_smem)


class Meeting(NamedTuple):
  """Where runs of K that are no cluster meet, in device memory; their columns are not gated.

  Attributes:
    sums: float32 [runs - 1, M, N], of all runs but the first.
    counts: int32, one for each 64 columns and share of their rows (hopper_grid.py).
    run: which run this is, an int32 scalar.
  """

  sums: Any
  counts: Any
  run: Any


def write_rows(y_smem, outputs, addends: Addends, meeting: Meeting | None, share: Share):
  """y[first_row + m, first_column + n] = sum over programs and slots of y_smem[slot + i][m, n], for a share of m.

  If gated, with half the columns: silu(gate) * up of the sums. A residual is added to that. With a norm to come, also
  scaled = y * norm and squares[first_column / 64, first_row + m] = sum of y^2 over 64 columns, of y before it is
  rounded.

  Args:
    y_smem: [all slots, block_m, PITCH]; float32, or y's dtype where there is nothing to add.
    outputs: y [M, N] with N a multiple of 8; what lies beyond M and N is not written. With a norm also scaled, like y,
      and squares [N / 64, M] in float32.
    addends: what `load_addends` of the same share returned.
    meeting: where other runs of K leave their sums, or None; only run 0 then writes y.
  """
  reducing = y_smem.dtype == jnp.float32
  width = 16 if share.gated and reducing else 8  # columns of sums for eight of y
  dtype, (m_end, n_end) = outputs[0].dtype, outputs[0].shape

  def write(ctx, y_ref, slot, number, first_row, first_column, *refs):
    del ctx
    slot, number, first_row, first_column = (
      scalar.registers.item() for scalar in (slot, number, first_row, first_column)
    )
    f32, i32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    loaded = []  # words of the first row's residual, of the norm
    if addends.loaded is not None:
      *refs, words = refs
      loaded = [[vector.extract(four, [], [i]) for i in range(4)] for four in words.registers.flat]
    if meeting is not None:
      run, *refs = refs
      run = run.registers.item()
    gmem = [llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)) for ref in refs]
    if meeting is not None:
      sums, *gmem = gmem
    if share.programs > 1:
      asm_void(_ACQUIRE)
    smem = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(y_ref))
    passes, place = share.places(number, first_row, first_column, (m_end, n_end))

    def address(slot, row):
      column, pitch = arith.muli(place, constant(width)), constant(y_smem.shape[2])
      element = arith.addi(arith.muli(arith.addi(arith.muli(slot, constant(share.block_m)), row), pitch), column)
      return arith.addi(smem, arith.muli(element, constant(4 if reducing else 2)))

    def load_slot(slot, row, program):
      """`width` float32 from the same place of another program's shared memory, or of this one's if it is alone."""
      values = []
      for offset in range(0, 4 * width, 16):
        text = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
        operands, kinds = [address(slot, row)], "=f,=f,=f,=f,r"
        if share.programs > 1:
          operands, kinds = [*operands, constant(program)], kinds + ",r"
          text = (
            "{ .reg .b32 there; mapa.shared::cluster.u32 there, $4, $5;"
            f" ld.shared::cluster.v4.f32 {{$0, $1, $2, $3}}, [there + {offset}]; }}"
          )
        values += asm([f32] * 4, operands, text, kinds)
      return values

    def sum_of_slots(row):
      if not reducing:
        words = asm([i32] * 4, [address(slot, row)], "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r")
        return _floats(words, dtype)
      total = None
      for program in range(share.programs):
        for i in range(share.slots):
          values = load_slot(arith.addi(slot, constant(i)), row, program)
          total = values if total is None else _add(total, values)
      return [_silu_times(*pair) for pair in zip(total[:8], total[8:], strict=True)] if share.gated else total

    def leave_for_run_0(element, values):
      of_run = arith.muli(arith.extui(i64, arith.subi(run, constant(1))), mgpu.c(m_end * n_end, i64))
      there = byte_at(sums, arith.addi(of_run, element), 4)
      for i in (0, 4):
        text = f"st.global.v4.f32 [$0 + {4 * i}], {{$1, $2, $3, $4}};"
        asm_void(text, [there, *values[i : i + 4]], "l,f,f,f,f")

    def left_for_run_0(element):
      """Eight float32 of each of the other runs."""
      there, values = byte_at(sums, element, 4), []
      for other in range(meeting.sums.shape[0]):
        for offset in (4 * other * m_end * n_end, 4 * other * m_end * n_end + 16):
          text = f"ld.global.v4.f32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
          values += asm([f32] * 4, [there], text, "=f,=f,=f,=f,l")
      return [values[i : i + 8] for i in range(0, len(values), 8)]

    def finish(m, element, total, residual):
      """Writes y, and with a norm to come what it reads."""
      if residual is not None:
        total = _add(total, _floats(residual, dtype))
      _store(gmem[0], element, total, dtype)
      if addends.norm is not None:
        _store(gmem[1], element, [arith.mulf(*pair) for pair in zip(total, norm, strict=True)], dtype)
        square = functools.reduce(arith.addf, [arith.mulf(value, value) for value in total])
        for distance in (1, 2, 4):
          exchange = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, $2;"
          square = arith.addf(square, asm([f32], [square, same_row], exchange, "=f,f,r")[0])
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, place, constant(0))):
          tile = arith.divui(first_column, constant(layout.TILE))
          there = byte_at(gmem[2], arith.extui(i64, arith.addi(arith.muli(tile, constant(m_end)), m)), 4)
          asm_void("st.global.f32 [$0], $1;", [there, square], "l,f")

    if addends.norm is not None:
      norm = _floats(loaded[-1], dtype)
      # Eight threads have a row, and are all inside or all outside.
      text = "{ .reg .b32 lane; mov.u32 lane, %laneid; and.b32 lane, lane, 24; shl.b32 $0, 255, lane; }"
      same_row = asm([i32], [], text, "=r")[0]
    for i, (m, n, row, inside) in enumerate(passes):
      with mgpu.utils.when(inside):
        element = element_at(m, n, n_end)
        residual = None
        if addends.residual is not None:
          residual = _load_words(gmem[len(outputs)], element) if i else loaded[0]
        total = sum_of_slots(row)
        if meeting is None:
          finish(m, element, total, residual)
        else:
          with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ne, run, constant(0))):
            leave_for_run_0(element, total)
          with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, run, constant(0))):
            finish(m, element, functools.reduce(_add, left_for_run_0(element), total), residual)
    if share.programs > 1:
      mgpu.utils.warpgroup_barrier()  # one thread tells the cluster that all of them have read

  refs = (*outputs, *(() if addends.residual is None else (addends.residual,)))
  types = (plgpu.RefType(()),) * len(refs)
  if meeting is not None:
    refs, types = (meeting.run, meeting.sums, *refs), (plgpu.Layout.WG_SPLAT, plgpu.RefType(()), *types)
    here = lax.div(share.first_column, layout.TILE) * share.slots + share.number
    pl.when(meeting.run == 0)(lambda: wait_for(meeting.counts, here, meeting.sums.shape[0], clear=True))
  if addends.loaded is not None:
    refs += (addends.loaded,)
    types += (plgpu.Layout.WG_STRIDED(addends.loaded.shape, vec_size=4),)
  types = (plgpu.RefType(()),) + (plgpu.Layout.WG_SPLAT,) * 4 + types
  scalars = share.tile * share.slots, share.number, share.first_row, share.first_column
  plgpu.inline_mgpu(arg_types=types)(write)(y_smem, *scalars, *refs)
  if meeting is not None:
    pl.when(meeting.run > 0)(lambda: publish(meeting.counts, here))


def _load_words(base, element):
  """Eight 16-bit floats of device memory, as words of two."""
  i32 = ir.IntegerType.get_signless(32)
  return asm([i32] * 4, [byte_at(base, element, 2)], "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l")


def _store(base, element, values, dtype):
  """Eight float32 to device memory, rounded."""
  i32 = ir.IntegerType.get_signless(32)
  convert = f"cvt.rn.{'bf16x2' if dtype == jnp.bfloat16 else 'f16x2'}.f32 $0, $1, $2;"
  words = [asm([i32], [values[i + 1], values[i]], convert, "=r,f,f")[0] for i in range(0, 8, 2)]
  asm_void("st.global.v4.b32 [$0], {$1, $2, $3, $4};", [byte_at(base, element, 2), *words], "l,r,r,r,r")


def _floats(words, dtype):
  """float32 of words of two 16-bit floats."""
  pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
  vectors = [mgpu.utils.bitcast(word, pair) for word in words]
  return [arith.extf(ir.F32Type.get(), vector.extract(v, [], [e])) for v in vectors for e in range(2)]


def _add(a, b):
  return [arith.addf(x, y) for x, y in zip(a, b, strict=True)]


def _silu_times(gate, up):
  """gate / (1 + exp(-gate)) * up, of float32, off by a few units in the last place."""
  text = (
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"  # -log2(e), 1
    " rcp.approx.ftz.f32 t, t; mul.f32 t, t, $1; mul.f32 $0, t, $2; }"
  )
  return asm([ir.F32Type.get()], [gate, up], text, "=f,f,f")[0]
