# SPDX-License-Identifier: Apache-2.0
"""The last wave of blocks, when it does not fill the GPU: idle multiprocessors compute the tails of the others' K.

    112 blocks, 132 programs    program 0 ... 111   block 0 ... 111   K 0 ------------------> 7/8
                                program 112         blocks 0, 20, 40, 60, 80, 100              7/8 -> K
                                program 113         blocks 1, 21, 41, 61, 81, 101              7/8 -> K
                                ...

All heads are read in step, so that multiprocessors ask for the same x at the same time. Equal runs across the borders
of blocks (striped partitioning: MARLIN, arXiv 2408.11743, section 3.4) balance a little better and took longer than no
balancing at all on an H100, 92.5 against 88.6 us at M=128 of 8192 x 28672: the programs are at different k then.

The helping programs start first and wait for nobody. A tail's sums go through device memory (`publish`, `release`);
the owner, done with its own, adds them (`collect`), always in this order.
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

_HANDOVER = 3  # steps that a tail takes longer than its share of K, to be written out


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tails:
  """Which steps are whose.

  Attributes:
    programs: as many as run at the same time.
    blocks: of y; not a multiple of `programs`, and at least half of them in the last wave.
    steps: of a block.
  """

  programs: int
  blocks: int
  steps: int

  def __post_init__(self):
    if self.owners < self.helpers or self.owners == 0 or self.head >= self.steps:
      raise ValueError(
        f"programs={self.programs} must leave half of them or more a block of {self.blocks} in the last wave, not all, "
        f"and steps={self.steps} must be enough to share"
      )

  @property
  def waves(self) -> int:
    """Whole blocks that every program computes first, alone."""
    return self.blocks // self.programs

  @property
  def owners(self) -> int:
    """Programs with a block in the last wave."""
    return self.blocks % self.programs

  @property
  def helpers(self) -> int:
    """Programs without one."""
    return self.programs - self.owners

  @property
  def head(self) -> int:
    """Steps of such a block that its owner computes: as long as a helper takes for all its tails."""
    tails = -(-self.owners // self.helpers)
    return -(-tails * (self.steps + _HANDOVER) // (tails + 1))

  def pieces(self, program):
    """How many blocks or parts of blocks `program` computes, an int32 scalar."""
    tails = lax.div(self.owners - (program - self.owners) + self.helpers - 1, self.helpers)
    return self.waves + jnp.where(program < self.owners, 1, tails)

  def piece(self, program, i):
    """(block, first step, steps) of the i-th piece of `program`, int32 scalars."""
    helps = self.helps(program, i)
    place = jnp.where(helps, program - self.owners + (i - self.waves) * self.helpers, program)
    first = jnp.where(helps, self.head, 0)
    steps = jnp.where(i < self.waves, self.steps, jnp.where(helps, self.steps - self.head, self.head))
    return jnp.minimum(i, self.waves) * self.programs + place, first, steps

  def helps(self, program, i):
    """Whether the i-th piece of `program` is the tail of another's block."""
    return (program >= self.owners) & (i >= self.waves)

  def is_helped(self, program, i):
    """Whether another program has the tail of the i-th piece of `program`."""
    return (program < self.owners) & (i >= self.waves)


def publish(acc, partials, slot):
  """Writes the warpgroup's sums where `collect` of another program finds them, after a `release`.

  Args:
    acc: float32 [64, block_m], an accumulator.
    partials: [slots, 64, block_m] float32 in device memory, in the order of registers.
    slot: of the warpgroup's columns, an int32 scalar.
  """

  def write(ctx, acc, partials, slot):
    del ctx
    scalars = [vector.extract(pair, [], [e]) for pair in acc.registers.flat for e in range(2)]
    address = _thread_address(partials, slot.registers.item(), len(scalars))
    for i in range(0, len(scalars), 4):
      text = f"st.global.v4.f32 [$0 + {i * 512}], {{$1, $2, $3, $4}};"
      asm_void(text, [address, *scalars[i : i + 4]], "l,f,f,f,f")
    mgpu.utils.warpgroup_barrier()

  types = (plgpu.Layout.WGMMA, plgpu.RefType(()), plgpu.Layout.WG_SPLAT)
  plgpu.inline_mgpu(arg_types=types)(write)(acc, partials, slot)


def release(flags, slot):
  """Says that the sums of `slot` are there. It waits until they have arrived, so it is best not called at once."""

  def write(ctx, flags, slot):
    del ctx
    with mgpu.utils.when(_first_thread()):
      asm_void("st.release.gpu.global.b32 [$0], 1;", [_flag_address(flags, slot.registers.item())], "l")

  plgpu.inline_mgpu(arg_types=(plgpu.RefType(()), plgpu.Layout.WG_SPLAT))(write)(flags, slot)


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
