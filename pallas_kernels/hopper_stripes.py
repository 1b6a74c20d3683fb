# SPDX-License-Identifier: Apache-2.0
"""Striped partitioning (MARLIN, arXiv 2408.11743, section 3.4): every program gets an equal run of work.

The blocks of y, one after the other, are a line of steps of K; what does not fill whole waves of programs is cut into
as many equal runs as there are programs, across the borders of blocks:

    block              0               1               2
    K          0 -----------> K 0 -----------> K 0 -----------> K
    program    000000000001111111111122222222222333333333333444444
    owner      0 . . . . . . .  1 . . . . . . .  3 . . . .

A block belongs to the program that has its K = 0. A program that begins within a block writes those sums out before
anything else (`publish`); the owner, done with its own, adds them in the order of K (`collect`). It waits only for
programs that were started before it.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import layout
from pallas_kernels.hopper_fragments import asm, asm_void


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stripes:
  """Which steps are whose. A unit is a turn of the ring of stages, at the end of a block what is left of one.

  Attributes:
    programs: how many share the work.
    blocks: of y.
    steps: of a block.
    stages: steps of a unit.
  """

  programs: int
  blocks: int
  steps: int
  stages: int

  def __post_init__(self):
    if self.units < self.programs:
      raise ValueError(f"programs={self.programs} must be at most the {self.units} turns of the ring to share")

  @property
  def whole_blocks(self) -> int:
    """Blocks that every program computes alone, before its run: all waves but the last full one and what follows it.

    So a run is at least a block where there are as many blocks as programs, and nobody adds up more than two parts.
    """
    return max(0, self.blocks // self.programs - 1) if self.blocks % self.programs else self.blocks // self.programs

  @property
  def units_of_block(self) -> int:
    """Turns of the ring in a block."""
    return -(-self.steps // self.stages)

  @property
  def units(self) -> int:
    """Units of all runs together, or of the whole blocks where there are no runs."""
    shared = self.blocks - self.whole_blocks * self.programs
    return (shared or self.blocks) * self.units_of_block

  def _run(self, program):
    if self.blocks == self.whole_blocks * self.programs:
      return 0, 0
    return (lax.div((program + i) * self.units, self.programs) for i in (0, 1))

  def pieces(self, program):
    """How many pieces of blocks `program` computes, an int32 scalar."""
    first, end = self._run(program)
    of_run = jnp.where(end > first, lax.div(end - 1, self.units_of_block) - lax.div(first, self.units_of_block) + 1, 0)
    return self.whole_blocks + of_run

  def piece(self, program, i):
    """(block, first step, steps) of the i-th piece of `program`, and (first, end) of the programs that have its rest.

    They are empty if the piece reaches the end of the block, and mean nothing if it does not begin at K = 0.
    """
    n = self.units_of_block
    first, end = self._run(program)
    border = (lax.div(first, n) + i - self.whole_blocks) * n
    first, end = jnp.maximum(first, border), jnp.minimum(end, border + n)
    last = lax.div((border + n) * self.programs + self.units - 1, self.units)
    whole = i < self.whole_blocks
    first_step = jnp.where(whole, 0, (first - border) * self.stages)
    steps = jnp.where(whole, self.steps, jnp.minimum((end - border) * self.stages, self.steps) - first_step)
    block = jnp.where(whole, i * self.programs + program, self.whole_blocks * self.programs + lax.div(border, n))
    return (block, first_step, steps), (program + 1, jnp.where(whole, program + 1, last))


def publish(acc, partials, flags, slot):
  """Writes the warpgroup's sums where `collect` of another program finds them.

  Args:
    acc: float32 [64, block_m], an accumulator.
    partials: [slots, 64, block_m] float32 in device memory, in the order of registers.
    flags: [slots] int32 in device memory: whether the sums are there.
    slot: the warpgroup's among all of all programs, an int32 scalar.
  """

  def write(ctx, acc, partials, flags, slot):
    del ctx
    slot = slot.registers.item()
    scalars = [vector.extract(pair, [], [e]) for pair in acc.registers.flat for e in range(2)]
    address = _thread_address(partials, slot, len(scalars))
    for i in range(0, len(scalars), 4):
      text = f"st.global.v4.f32 [$0 + {i * 512}], {{$1, $2, $3, $4}};"
      asm_void(text, [address, *scalars[i : i + 4]], "l,f,f,f,f")
    mgpu.utils.warpgroup_barrier()
    with mgpu.utils.when(_first_thread()):
      asm_void("st.release.gpu.global.b32 [$0], 1;", [_flag_address(flags, slot)], "l")

  types = (plgpu.Layout.WGMMA, plgpu.RefType(()), plgpu.RefType(()), plgpu.Layout.WG_SPLAT)
  plgpu.inline_mgpu(arg_types=types)(write)(acc, partials, flags, slot)


def collect(partials, flags, slot):
  """The sums that another program published in `slot`, once they are there; its flag is then as it was before."""
  _, _, block_m = partials.shape
  shape = (layout.TILE, block_m)

  def read(ctx, partials, flags, slot):
    del ctx
    slot = slot.registers.item()
    with mgpu.utils.when(_first_thread()):
      flag = _flag_address(flags, slot)
      text = """{ .reg .pred missing; .reg .b32 there;
        again: ld.acquire.gpu.global.b32 there, [$0]; setp.eq.b32 missing, there, 0; @missing bra again; }"""
      asm_void(text, [flag], "l")
      asm_void("st.relaxed.gpu.global.b32 [$0], 0;", [flag], "l")
    mgpu.utils.warpgroup_barrier()
    f32 = ir.F32Type.get()
    count = block_m // 2
    address = _thread_address(partials, slot, count)
    scalars = []
    for i in range(0, count, 4):
      text = f"ld.global.v4.f32 {{$0, $1, $2, $3}}, [$4 + {i * 512}];"
      scalars += asm([f32] * 4, [address], text, "=f,=f,=f,=f,l")
    pair = ir.VectorType.get((2,), f32)
    registers = np.empty(fa.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
    registers.flat[:] = [vector.from_elements(pair, scalars[i : i + 2]) for i in range(0, count, 2)]
    return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

  types = (plgpu.RefType(()), plgpu.RefType(()), plgpu.Layout.WG_SPLAT)
  out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)
  return plgpu.inline_mgpu(arg_types=types, return_type=out)(read)(partials, flags, slot)


def _thread():
  i32 = ir.IntegerType.get_signless(32)
  return arith.remui(mgpu.utils.thread_idx(), mgpu.c(128, i32))


def _first_thread():
  return arith.cmpi(arith.CmpIPredicate.eq, _thread(), mgpu.c(0, ir.IntegerType.get_signless(32)))


def _flag_address(flags, slot):
  return _address(flags, slot, 4)


def _thread_address(partials, slot, count: int):
  """Of this thread's first four values of the slot; the next four lie 128 threads on: warps write whole lines."""
  i32 = ir.IntegerType.get_signless(32)
  sixteens = arith.addi(arith.muli(slot, mgpu.c(count // 4 * 128, i32)), _thread())
  return _address(partials, sixteens, 16)


def _address(ref, index, nbytes: int):
  i64 = ir.IntegerType.get_signless(64)
  base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
  return arith.addi(base, arith.muli(arith.extui(i64, index), mgpu.c(nbytes, i64)))
