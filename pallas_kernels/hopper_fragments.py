# SPDX-License-Identifier: Apache-2.0
"""The pieces of the Hopper kernel that Pallas has no words for: fragments in registers, and wgmma on them.

Everything here is for a warpgroup, 128 threads. `fa` is a private API of JAX: the lowering tests watch it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

from pallas_kernels import layout
from pallas_kernels.dequant import DECODED, OF_BITS, pair_literal

Layout = plgpu.Layout
# The 512 words that say where the codes of a tile belong, four for each thread (layout24.py).
POSITIONS = Layout.WG_STRIDED((4, 128), vec_size=4)
_SWIZZLE = 128  # bytes; a row of x in shared memory is 64 values of 16 bits
X_TRANSFORMS = (plgpu.TilingTransform((8, layout.TILE)), plgpu.SwizzleTransform(_SWIZZLE))


def asm(result_types, operands, text, constraints):
  """Inline assembly with several results, never moved across other assembly of this kind."""
  if len(result_types) == 1:
    return [llvm.inline_asm(result_types[0], operands, text, constraints, has_side_effects=True)]
  struct = llvm.inline_asm(
    llvm.StructType.get_literal(result_types), operands, text, constraints, has_side_effects=True, asm_dialect=0
  )
  return [llvm.extractvalue(t, struct, [i]) for i, t in enumerate(result_types)]


def asm_void(text, operands=(), constraints=""):
  """Inline assembly without a result, never moved across other assembly of this kind."""
  llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), text, constraints, has_side_effects=True)


def constant(value: int):
  """A 32-bit constant."""
  return mgpu.c(value, ir.IntegerType.get_signless(32))


def thread_of_warpgroup():
  """The number of a thread in its warpgroup."""
  return arith.remui(mgpu.utils.thread_idx(), constant(128))


class Address(NamedTuple):
  """A place in shared memory, in bytes from its beginning: the sum of two int32 scalars, none negative.

  Attributes:
    own: what only a warpgroup knows.
    offset: the rest, a constant wherever a loop is unrolled.
  """

  own: Any
  offset: Any


class Ring(NamedTuple):
  """Where what a warpgroup reads of the stages of an operand is in shared memory: bytes, int32 scalars.

  What reads a part of a stage takes its address: of every array that is handed to an inline function, whole or in part,
  Pallas would have to find the layout, which took a third of lowering (docs/kernel.md, What lowering costs).

  Attributes:
    own: from the beginning of a stage to what this warpgroup reads of it.
    start: of the first stage.
    apart: from one stage to the next.
  """

  own: Any
  start: Any
  apart: Any

  def address(self, stage, offset) -> Address:
    """`offset` bytes after the first that is read of a stage, ints or int32 scalars."""
    return Address(self.own, self.start + stage * self.apart + offset)


def ring_of(stages, own, transforms=()) -> Ring:
  """The ring of an array of stages."""
  scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=Layout.WG_SPLAT)

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms),), return_type=(scalar, scalar))
  def find(ctx, ref):
    del ctx
    i32, kind = ir.IntegerType.get_signless(32), ir.MemRefType(ref.type)
    here, beginning = (llvm.ptrtoint(i32, pointer) for pointer in (mgpu.utils.memref_ptr(ref), _shared_memory()))
    strides, _ = kind.get_strides_and_offset()
    apart = constant(strides[0] * mgpu.utils.bytewidth(kind.element_type))
    return tuple(fa.FragmentedArray.splat(n, (), is_signed=True) for n in (arith.subi(here, beginning), apart))

  return Ring(own, *find(stages))


class Columns(NamedTuple):
  """A value for each of 64 columns, in shared memory: an address and a dtype."""

  address: Address
  dtype: Any


_ADDRESS = Address(Layout.WG_SPLAT, Layout.WG_SPLAT)  # as an argument of an inline function


def _pointer(address: Address):
  """To shared memory, within an inline function."""
  # Added up one by one, so that constants stay apart and become those of the instructions: as sums, ten addresses of a
  # loop took twenty registers, and 64 rows spilled.
  pointer = _shared_memory()
  for part in address:
    part = arith.extui(ir.IntegerType.get_signless(64), part.registers.item())
    pointer = mgpu.utils.getelementptr(pointer, [part], ir.IntegerType.get_signless(8))
  return pointer


def _shared_memory():
  """A pointer to its beginning. From there all places are a constant away, and need no register each."""
  byte, length = ir.IntegerType.get_signless(8), ir.ShapedType.get_dynamic_size()
  kind = ir.MemRefType.get((length,), byte, memory_space=mgpu.utils.smem())
  return mgpu.utils.memref_ptr(gpu.dynamic_shared_memory(kind))


# What a fragment whose weights are scaled is multiplied by, until its sums are divided by it; others by DECODED.
DECODED_SCALED = 2.0**-40


def _decode_asm(dtype, linear: tuple[str, ...]) -> str:
  """PTX that turns the word $4, eight nibbles, into four pairs $0..$3 of bits * factor + offset.

  See dequant.py.

  Args:
    linear: factor and offset for nibbles in bits 0 to 3, then for those in bits 4 to 7: literals or registers.
  """
  kind, one = ("bf16x2", "0x00000000") if dtype == jnp.bfloat16 else ("f16x2", "0x64006400")
  return f"""{{ .reg .b32 t, f0, o0, f1, o1; shr.u32 t, $4, 8;
    lop3.b32 $0, $4, 0x000F000F, {one}, 0xEA; lop3.b32 $1, $4, 0x00F000F0, {one}, 0xEA;
    lop3.b32 $2, t, 0x000F000F, {one}, 0xEA; lop3.b32 $3, t, 0x00F000F0, {one}, 0xEA;
    mov.b32 f0, {linear[0]}; mov.b32 o0, {linear[1]}; mov.b32 f1, {linear[2]}; mov.b32 o1, {linear[3]};
    fma.rn.{kind} $0, $0, f0, o0; fma.rn.{kind} $1, $1, f1, o1;
    fma.rn.{kind} $2, $2, f0, o0; fma.rn.{kind} $3, $3, f1, o1; }}"""


# Of a scale each, in bfloat16, OF_BITS with which nibbles become (nibble - 8) * scale * DECODED_SCALED.
OF_BITS_SCALED = (2.0**93, -(2.0**-37)), (2.0**89, -(2.0**-37))


def decode_tile(
  words: Address, dtype, *, planes: int, zero: int, zeros: Columns | None = None, scales: Columns | None = None
):
  """The (64 n, 64 k) tile of codes less a zero point, as a wgmma A fragment: times DECODED, exact.

  With scales times those and DECODED_SCALED, rounded once: they must be of less than 2**34.

  Args:
    words: address of 1024 int16 words of nibbles (layout.py), of which a thread reads eight.
    planes: 1, or 2: the high nibbles of codes of 8 bits, then the low ones.
    zero: the code that is to be zero, 0 or the middle one.
    zeros: fractions perhaps: the difference is rounded once. Of codes of 4 bits in bfloat16 whose `zero` is 0; beside
      float16's 1024 there is no room for a fraction.
    scales: of codes of 4 bits in bfloat16 without zeros.
  """
  more = [values for values in (zeros, scales) if values is not None]

  @plgpu.inline_mgpu(
    arg_types=(_ADDRESS,) * (1 + len(more)),
    return_type=plgpu.ShapeDtypeStruct((layout.TILE, layout.TILE), dtype, layout=Layout.WGMMA),
  )
  def decode(ctx, words, *addresses):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    element = mgpu.utils.dtype_to_ir_type(dtype)
    pair, byte = ir.VectorType.get((2,), element), ir.IntegerType.get_signless(8)

    def number(value):
      return arith.constant(element, ir.FloatAttr.get(element, value))

    def linear():
      """What `_decode_asm` takes from registers; a thread has two columns, one's nibbles in bits 0 to 3."""
      operands = []
      for i, value in enumerate(_load_columns(*addresses, more[0].dtype).astype(element).registers.flat):
        value = vector.extract(value, [], [0])
        if scales is not None:
          operands += [arith.mulf(value, number(part)) for part in OF_BITS_SCALED[i]]
        else:
          operands += [number(OF_BITS[dtype][i][0]), arith.mulf(value, number(-DECODED[dtype]))]
      return [mgpu.utils.bitcast(vector.broadcast(pair, operand), i32) for operand in operands]

    def nibbles(plane, zero):
      mine = arith.extui(ir.IntegerType.get_signless(64), arith.muli(thread_of_warpgroup(), constant(16)))
      there = mgpu.utils.getelementptr(_pointer(words), [mine], byte)
      there = mgpu.utils.getelementptr(there, [plane * 2 * layout.TILE_WORDS], byte)
      vec = llvm.load(ir.VectorType.get((4,), i32), there, alignment=16)
      if more:
        of_columns, names = linear(), tuple(f"${i}" for i in range(5, 9))
      else:
        of_columns, names = [], ()
        for factor, offset in OF_BITS[dtype]:
          names += pair_literal(factor, dtype), pair_literal(offset - zero * DECODED[dtype], dtype)
      text, constraints = _decode_asm(dtype, names), "=&r,=&r,=&r,=&r,r" + ",r" * len(of_columns)
      four = [vector.extract(vec, [], [j]) for j in range(4)]
      return [p for word in four for p in asm([i32] * 4, [word, *of_columns], text, constraints)]

    pairs = nibbles(0, zero if planes == 1 else zero // 16)
    if planes == 2:
      # code - 128 = 16 (high - 8) + low: every term is an integer of at most 8 bits.
      kind = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
      text = f"{{ .reg .b32 sixteen; mov.b32 sixteen, {pair_literal(16, dtype)}; fma.rn.{kind} $0, $1, sixteen, $2; }}"
      low = nibbles(1, 0)
      pairs = [asm([i32], [h, l], text, "=r,r,r")[0] for h, l in zip(pairs, low, strict=True)]
    registers = np.empty(fa.WGMMA_LAYOUT.registers_shape((layout.TILE, layout.TILE)), dtype=object)
    registers.flat[:] = [mgpu.utils.bitcast(p, pair) for p in pairs]
    return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

  return decode(words, *(values.address for values in more))


def of_columns(values: Columns, shape: tuple[int, int]):
  """values[n] at every [n, :] of `shape`, as an accumulator or a fragment has it."""

  @plgpu.inline_mgpu(
    arg_types=(_ADDRESS,), return_type=plgpu.ShapeDtypeStruct(shape, values.dtype, layout=Layout.WGMMA)
  )
  def load(ctx, address):
    del ctx
    return _load_columns(address, values.dtype).broadcast_in_dim(shape, (0,), fa.WGMMA_LAYOUT)

  return load(values.address)


def _load_columns(address: Address, dtype) -> fa.FragmentedArray:
  """Those two of `Columns` that a thread has."""
  kind = ir.MemRefType.get((layout.TILE,), mgpu.utils.dtype_to_ir_type(dtype), memory_space=mgpu.utils.smem())
  values = mgpu.utils.ptr_as_memref(_pointer(address), kind)
  return fa.FragmentedArray.load_untiled(values, layout=fa.WGMMA_LAYOUT.reduce((1,)), optimized=False)


def _scalars(array):
  """The float32 registers of an accumulator, in the order of wgmma's D operand."""
  return [vector.extract(pair, [], [e]) for pair in array.registers.flat for e in range(2)]


def _accumulator(scalars, shape):
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  registers = np.empty(fa.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
  registers.flat[:] = [vector.from_elements(pair, scalars[i : i + 2]) for i in range(0, len(scalars), 2)]
  return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)


def mma_issue(w, x: Address, acc, *, block_m: int, block_k: int, positions=None, k_steps=(0, 4)):
  """Starts acc + w . x^T on four steps of a tile, or [k_steps) of them. Not to be read before `mma_wait`.

  A step is 16 k; with `positions`, of 2:4 sparse weights, 32 k, of which w holds 16. An acc of None is zero.

  Not plgpu.wgmma: there an accumulator starts as registers full of zeros, and ptxas serialises every wgmma of the
  kernel when it sees ordinary instructions write accumulators while others are in flight. The first instruction of
  a sum ignores its accumulator instead (scale-d = 0).

  Args:
    x: address of its first 64 k in a stage with X_TRANSFORMS, [block_m / 8, block_k / 64, 8, 64].
  """
  shape = (layout.TILE, block_m)
  dtype = "bf16" if w.dtype == jnp.bfloat16 else "f16"

  def issue(ctx, w, x, *others):
    del ctx
    others = list(others)
    meta = None if positions is None else others.pop(0)
    (acc,) = others or [None]
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    count = block_m // 2
    descriptor = mma_utils.encode_descriptor(
      _pointer(x), leading_byte_offset=0, stride_byte_offset=8 * block_k * 2, swizzle=_SWIZZLE
    )
    low, high = (arith.trunci(i32, word) for word in (descriptor, arith.shrui(descriptor, mgpu.c(32, descriptor.type))))
    # Plus a zero that ptxas does not know to be one: where it knows the high half, it writes it anew before every
    # wgmma, three instructions for a descriptor instead of one and a half. 54.6 and 53.7 us at M=64.
    high = arith.addi(high, llvm.inline_asm(i32, [], "mov.u32 $0, %ctaid.z;", "=r"))
    fragment = [mgpu.utils.bitcast(pair, i32) for pair in w.registers.flat]
    sums = None if acc is None else _scalars(acc)
    if meta is not None:
      (words,) = meta.registers.flat
      meta = vector.bitcast(ir.VectorType.get((2,), i32), words)
    asm_void("wgmma.fence.sync.aligned;")
    for step in range(*k_steps):
      a = fragment[4 * step : 4 * step + 4]
      # In sixteens of bytes: 16 values are two, and after 64 of them there is the next run of 8 rows x 64 values.
      k = 16 * step if meta is None else 32 * step
      advance = k // 64 * 8 * 64 // 8 + k % 64 // 8
      outs = ", ".join(f"${i}" for i in range(count))
      first = count if sums is None else 2 * count
      regs = ", ".join(f"${first + i}" for i in range(4))
      operands, kinds = [*a, low, high], ",r,r,r,r,r,r"
      name, where = f"mma_async.sync.aligned.m64n{block_m}k16", ""
      if meta is not None:  # a register of positions serves two steps, from two threads of four each
        operands.append(vector.extract(meta, [], [step // 2]))
        kinds += ",r"
        name, where = f"mma_async.sp.sync.aligned.m64n{block_m}k32", f" ${first + 6}, {step % 2},"
      # Added up in here: the descriptors of all steps and stages would be constants of the loop to ptxas, which keeps
      # them in registers until it has none left and then reads each from memory.
      text = (
        f"{{ .reg .b64 x; mov.b64 x, {{${first + 4}, ${first + 5}}}; add.u64 x, x, {advance}; "
        f"wgmma.{name}.f32.{dtype}.{dtype} {{{outs}}}, {{{regs}}}, x,{where} {0 if sums is None else 1}, 1, 1, 0; }}"
      )
      tied = "" if sums is None else "," + ",".join(str(i) for i in range(count))
      sums = asm([f32] * count, [*(sums or []), *operands], text, ",".join(["=f"] * count) + tied + kinds)
    asm_void("wgmma.commit_group.sync.aligned;")
    return _accumulator(sums, shape)

  args, arg_types = [w, x], [Layout.WGMMA, _ADDRESS]
  for arg, arg_type in ((positions, POSITIONS), (acc, Layout.WGMMA)):
    if arg is not None:
      args.append(arg)
      arg_types.append(arg_type)
  out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=Layout.WGMMA)
  return plgpu.inline_mgpu(arg_types=tuple(arg_types), return_type=out)(issue)(*args)


def mma_wait(*accs):
  """The accumulators, once every started wgmma is done: they pass through the wait, so that no use precedes it."""
  shape = accs[0].shape

  def wait(ctx, *accs):
    del ctx
    scalars = [s for acc in accs for s in _scalars(acc)]
    count = len(scalars)
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)])
    done = asm([ir.F32Type.get()] * count, scalars, "wgmma.wait_group.sync.aligned 0;", constraints)
    each = count // len(accs)
    return tuple(_accumulator(done[i * each : (i + 1) * each], shape) for i in range(len(accs)))

  out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=Layout.WGMMA)
  types = (Layout.WGMMA,) * len(accs)
  return plgpu.inline_mgpu(arg_types=types, return_type=(out,) * len(accs))(wait)(*accs)
