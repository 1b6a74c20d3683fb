# SPDX-License-Identifier: Apache-2.0
"""All programs of a launch wait for each other, in device memory: what one of them wrote, the others may then read.

    computing warpgroups    publish: y is written, count[product] += 1
    copying warpgroup       wait_for: until count[product] is what all of them make together; then TMA may read y
    copying warpgroup       leave: the last one of all programs makes every count 0 again

Runs of K that meet in device memory (hopper_reduce.py) have counts of their own, which the one who waits clears.

A launch finds zeros and leaves zeros, so the counts may be a constant of the compiled program, which nothing has to
clear. All programs must be on the card at the same time, or those that are would wait for ever: no more than there are
multiprocessors, one each, and no second such launch beside it. In a model every launch reads what the one before wrote.

Each of these is one piece of assembly with its conditions inside. A branch that LLVM can see it copies into both arms
of another, barrier included, and a warp of which some threads are at one copy and some at the other waits for ever. A
branch around the whole of one must be taken by all threads of a program or by none, as that on the run of K is.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper_fragments import asm_void, thread_of_warpgroup

_COUNT = plgpu.RefType(()), plgpu.Layout.WG_SPLAT  # as arguments of an inline function: counts, and which of them


def counts(count: int) -> np.ndarray:
  """int32: so many counts, all 0.

  And a 1, so that XLA does not take it for something to fill anew before every launch.
  """
  return np.array([0] * count + [1], np.int32)


def publish(counts_gmem, place):
  """A warpgroup has written what those read who wait for counts[place], an int or an int32 scalar."""
  # Written by ordinary stores, read by TMA, two proxies; sums that meet are read by ordinary loads, and without this
  # fence they took as long. One release by one thread behind a barrier is enough; a fence
  # of each thread before it took 1 us more.
  assembly = "{ .reg .pred p; setp.eq.u32 p, $1, 0; @p red.release.gpu.global.add.u32 [$0], 1; }"

  def arrive(ctx, ref, place):
    del ctx
    asm_void("fence.proxy.async.global;")
    mgpu.utils.warpgroup_barrier()
    asm_void(assembly, [_address(ref, place), thread_of_warpgroup()], "l,r")

  plgpu.inline_mgpu(arg_types=_COUNT)(arrive)(counts_gmem, jnp.int32(place))


def wait_for(counts_gmem, place, warpgroups: int, *, clear: bool = False):
  """Returns once so many warpgroups have published.

  Args:
    clear: make the count 0 again, for which a warpgroup must be the only one that waits.
  """
  assembly = (
    f"{{ .reg .pred first, less; .reg .u32 count; setp.eq.u32 first, $1, 0; mov.u32 count, {warpgroups};"
    " AGAIN: @first ld.acquire.gpu.global.u32 count, [$0];"
    f" setp.lt.u32 less, count, {warpgroups}; @less bra AGAIN;"
    f" {'@first st.relaxed.gpu.global.u32 [$0], 0;' if clear else ''} }}"
  )

  def wait(ctx, ref, place):
    del ctx
    asm_void(assembly, [_address(ref, place), thread_of_warpgroup()], "l,r")
    mgpu.utils.warpgroup_barrier()
    asm_void("fence.proxy.async.global;")

  plgpu.inline_mgpu(arg_types=_COUNT)(wait)(counts_gmem, jnp.int32(place))


def leave(counts_gmem, products: int, programs: int):
  """A program's copying warpgroup waits for nothing any more; counts of products, and one of programs that left."""
  clear = " ".join(f"@last st.relaxed.gpu.global.u32 [$0 + {4 * i}], 0;" for i in range(products + 1))
  assembly = (
    "{ .reg .pred first, last; .reg .u32 left; mov.u32 left, 0; setp.eq.u32 first, $1, 0;"
    f" @first atom.acq_rel.gpu.global.add.u32 left, [$0 + {4 * products}], 1;"
    f" setp.eq.u32 last, left, {programs - 1}; {clear} }}"
  )

  def count(ctx, ref, place):
    del ctx
    asm_void(assembly, [_address(ref, place), thread_of_warpgroup()], "l,r")

  plgpu.inline_mgpu(arg_types=_COUNT)(count)(counts_gmem, jnp.int32(0))


def _address(ref, place):
  i64 = ir.IntegerType.get_signless(64)
  offset = arith.muli(arith.extui(i64, place.registers.item()), mgpu.c(4, i64))
  return arith.addi(llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)), offset)
