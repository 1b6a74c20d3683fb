# SPDX-License-Identifier: Apache-2.0
"""The Mosaic GPU kernel for Hopper: weights as the register operand of wgmma, the batch as its narrow side."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector
from jaxtyping import Array, Float, Int16

from pallas_kernels import layout
from pallas_kernels.hardware import H200, Device
from pallas_kernels.problem import MatmulProblem

Layout = plgpu.Layout
# The 1024 int16 words of a tile, eight for each thread of a warpgroup: one 16-byte load (layout.py).
_WORDS = Layout.WG_STRIDED((8, 128), vec_size=8)
_SWIZZLE = 128  # bytes; a row of x in shared memory is 64 values of 16 bits
_X_TRANSFORMS = (plgpu.TilingTransform((8, layout.TILE)), plgpu.SwizzleTransform(_SWIZZLE))
_COPY_REGISTERS = 32
_LAUNCH_REGISTERS = {3: 168, 4: 128, 5: 96}  # per thread, by warpgroups of a program


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HopperConfig:
  """What one program computes, and how.

  Attributes:
    block_m: rows of x, the N of the matrix instruction.
    num_compute_warpgroups: each owns 64 columns; one more warpgroup copies.
    block_k: k per pipeline stage.
    num_stages: stages in shared memory.
    split_k: programs that share one output block; each sums a run of K, a second pass adds the runs in order.
    cluster: neighbouring column blocks that read x from L2 once, by multicast (1 or 2).
    scale_weights: multiply the weights, rounding them to x's dtype, and not each group's float32 sum. Costs
      64 / block_m of the other way for groups of 128 and saves a second accumulator.
    decode_ahead: dequantize the next tile while the tensor cores work on this one. Needs two tiles a stage: with one,
      both fragments would be the same loop-carried registers, and ptxas serialises the kernel (its note C7513).
  """

  block_m: int
  num_compute_warpgroups: int
  block_k: int
  num_stages: int
  split_k: int = 1
  cluster: int = 1
  scale_weights: bool = False
  decode_ahead: bool = True

  def __post_init__(self):
    for name, allowed in dict(
      block_m=(8, 16, 32, 64, 128, 256), num_compute_warpgroups=(2, 3, 4), block_k=(64, 128, 256, 512), cluster=(1, 2)
    ).items():
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name}={getattr(self, name)} must be one of {allowed}")
    if self.split_k < 1 or self.num_stages < 2:
      raise ValueError(f"split_k={self.split_k} must be at least 1 and num_stages={self.num_stages} at least 2")
    if self.decode_ahead and self.block_k == layout.TILE:
      raise ValueError(f"decode_ahead needs block_k={self.block_k} to be at least {2 * layout.TILE}")
    self.check_shared_memory(group_size=self.block_k, itemsize=2)
    # Accumulators, two fragments, and what addresses and the loop take.
    needed = self.block_m // 2 * (1 if self.scale_weights else 2) + 16 * (1 + self.decode_ahead) + 16
    if needed > self.compute_registers:
      raise ValueError(f"{self} needs some {needed} registers a thread; {self.compute_registers} can be had")

  @property
  def block_n(self) -> int:
    """Columns of one program."""
    return layout.TILE * self.num_compute_warpgroups

  @property
  def compute_registers(self) -> int:
    """Registers of a computing thread.

    A warpgroup that asks for more waits until another one has given enough away: for ever, if the sum over all
    warpgroups exceeds what the program was launched with, which is the register file divided by its threads and
    rounded down to a multiple of 8.
    """
    warpgroups = self.num_compute_warpgroups + 1
    pool = warpgroups * _LAUNCH_REGISTERS[warpgroups]
    return min(240, (pool - _COPY_REGISTERS) // self.num_compute_warpgroups // 8 * 8)

  def check_shared_memory(self, group_size: int, itemsize: int):
    """Raises ValueError if the stages do not fit into shared memory, with scales of `itemsize` bytes."""
    words = self.block_n * self.block_k // 2
    scales = max(1, self.block_k // group_size) * self.block_n * itemsize
    stage = words + self.block_m * self.block_k * 2 + scales
    y = self.block_m * self.block_n * (2 if self.split_k == 1 else 4)
    needed = self.num_stages * stage + y + 2048  # barriers and alignment
    if needed > H200.shared_memory:
      raise ValueError(f"{self} needs {needed} bytes of shared memory, more than {H200.shared_memory}")


def unsupported_reason(problem: MatmulProblem, device: Device) -> str | None:
  """Why this kernel cannot take `problem` on `device`; None if it can."""
  if jax.__version_info__ < (0, 11):
    return f"it needs JAX 0.11, this is {jax.__version__}"
  if device.platform != "cuda":
    return f"it runs on NVIDIA GPUs, not on {device.platform}"
  if not any(name in device.kind for name in ("H100", "H200", "H20", "H800", "GH200")):
    return f"it runs on Hopper GPUs (compute capability 9.0), and {device.kind!r} is none that it knows"
  if problem.dtype not in (jnp.bfloat16, jnp.float16):
    return f"x must be bfloat16 or float16, not {problem.dtype}"
  if problem.group_size != 32 and problem.group_size % 64 and problem.group_size != problem.k:
    return f"group_size={problem.group_size} must be 32, a multiple of 64 or the whole column"
  return None


def hopper_config(problem: MatmulProblem, num_sms: int) -> HopperConfig:
  """The config for `problem` on a GPU with `num_sms` multiprocessors, from its sizes alone."""
  k, n = layout.padded_shape(problem.k, problem.n)
  # Groups of 32 have two partial sums a tile, more registers than a wide block leaves.
  largest = 64 if problem.group_size < min(layout.TILE, problem.k) else 256
  block_m = next(block for block in (8, 16, 32, 64, 128, 256) if problem.m <= block or block == largest)
  warpgroups = {8: 4, 16: 4, 32: 4, 64: 3}.get(block_m, 2)
  block_k = {8: 256, 16: 256, 256: 64}.get(block_m, 128)
  if problem.group_size < problem.k:
    while block_k % problem.group_size and problem.group_size % block_k:
      block_k //= 2
  blocks = -(-problem.m // block_m) * -(-n // (layout.TILE * warpgroups))
  # One program on every multiprocessor, but at least 512 k for each.
  split_k = max(1, min(num_sms // blocks, k // 512))
  config = HopperConfig(
    block_m=block_m,
    num_compute_warpgroups=warpgroups,
    block_k=block_k,
    num_stages=2,
    split_k=split_k,
    scale_weights=block_m == 256,
    decode_ahead=block_k > layout.TILE,
  )
  for stages in range(8, 2, -1):
    try:
      deeper = dataclasses.replace(config, num_stages=stages)
      deeper.check_shared_memory(_group_size(problem, config), 4)
      return deeper
    except ValueError:
      pass
  return config


# --- the pieces that Pallas has no words for ---------------------------------------------------------------------


def _asm(result_types, operands, text, constraints):
  """Inline assembly with several results, never moved across other assembly of this kind."""
  if len(result_types) == 1:
    return [llvm.inline_asm(result_types[0], operands, text, constraints, has_side_effects=True)]
  struct = llvm.inline_asm(
    llvm.StructType.get_literal(result_types), operands, text, constraints, has_side_effects=True, asm_dialect=0
  )
  return [llvm.extractvalue(t, struct, [i]) for i, t in enumerate(result_types)]


def _decode_asm(dtype) -> str:
  """PTX that turns the word $4, eight nibbles, into four pairs $0..$3 of (nibble - 8) (constants: dequant.py)."""
  if dtype == jnp.bfloat16:
    # A nibble fits a bf16 mantissa in its lowest four bits only: shift by 4, 8, 12.
    return """{ .reg .b32 t1, t2, t3, zero;
      shr.u32 t1, $4, 4; shr.u32 t2, $4, 8; shr.u32 t3, $4, 12;
      lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA; lop3.b32 $1, t1, 0x000F000F, 0x43004300, 0xEA;
      lop3.b32 $2, t2, 0x000F000F, 0x43004300, 0xEA; lop3.b32 $3, t3, 0x000F000F, 0x43004300, 0xEA;
      mov.b32 zero, 0x43084308;
      sub.bf16x2 $0, $0, zero; sub.bf16x2 $1, $1, zero; sub.bf16x2 $2, $2, zero; sub.bf16x2 $3, $3, zero; }"""
  # The ten mantissa bits of fp16 hold it in bits 4..7 as well: 1024 + 16 v, then * 1/16 - (64 + 8).
  return """{ .reg .b32 t, zero, sixteenth, zero16;
    shr.u32 t, $4, 8;
    lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA; lop3.b32 $1, $4, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 $2, t, 0x000F000F, 0x64006400, 0xEA; lop3.b32 $3, t, 0x00F000F0, 0x64006400, 0xEA;
    mov.b32 zero, 0x64086408; mov.b32 sixteenth, 0x2C002C00; mov.b32 zero16, 0xD480D480;
    sub.f16x2 $0, $0, zero; fma.rn.f16x2 $1, $1, sixteenth, zero16;
    sub.f16x2 $2, $2, zero; fma.rn.f16x2 $3, $3, sixteenth, zero16; }"""


def _decode(words, dtype):
  """1024 int16 words -> the (64 n, 64 k) tile of (nibble - 8) as a wgmma A fragment."""

  @plgpu.inline_mgpu(
    arg_types=(_WORDS,), return_type=plgpu.ShapeDtypeStruct((layout.TILE, layout.TILE), dtype, layout=Layout.WGMMA)
  )
  def decode(ctx, words):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
    (vec,) = words.registers.flat
    vec = vector.bitcast(ir.VectorType.get((4,), i32), vec)
    registers = np.empty(fa.WGMMA_LAYOUT.registers_shape((layout.TILE, layout.TILE)), dtype=object)
    pairs = []
    for j in range(4):
      word = vector.extract(vec, [], [j])
      pairs += _asm([i32] * 4, [word], _decode_asm(dtype), "=&r,=&r,=&r,=&r,r")
    registers.flat[:] = [mgpu.utils.bitcast(p, pair) for p in pairs]
    return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

  return decode(words)


def _scalars(array):
  """The float32 registers of an accumulator, in the order of wgmma's D operand."""
  return [vector.extract(pair, [], [e]) for pair in array.registers.flat for e in range(2)]


def _accumulator(scalars, shape):
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  registers = np.empty(fa.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
  registers.flat[:] = [vector.from_elements(pair, scalars[i : i + 2]) for i in range(0, len(scalars), 2)]
  return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)


def _mma_issue(w, x_smem, acc, *, k_steps=(0, 4)):
  """Starts acc + w . x^T on 16-wide steps [k_steps) of a tile; acc None is zero. Not to be read before `_mma_wait`.

  Not plgpu.wgmma: there an accumulator starts as registers full of zeros, and ptxas serialises every wgmma of the
  kernel when it sees ordinary instructions write accumulators while others are in flight. The first instruction of
  a sum ignores its accumulator instead (scale-d = 0).
  """
  block_m, _ = x_smem.shape
  shape = (layout.TILE, block_m)
  dtype = "bf16" if w.dtype == jnp.bfloat16 else "f16"

  def issue(ctx, w, x_ref, acc=None):
    del ctx
    f32, i32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    count = block_m // 2
    strides, _ = ir.MemRefType(x_ref.type).get_strides_and_offset()  # of [block_m / 8, 1, 8, 64]
    descriptor = mma_utils.encode_descriptor(
      x_ref, leading_byte_offset=0, stride_byte_offset=strides[0] * 2, swizzle=_SWIZZLE
    )
    fragment = [mgpu.utils.bitcast(pair, i32) for pair in w.registers.flat]
    sums = None if acc is None else _scalars(acc)
    _asm_void("wgmma.fence.sync.aligned;")
    for step in range(*k_steps):
      a = fragment[4 * step : 4 * step + 4]
      b = arith.addi(descriptor, mgpu.c(2 * step, i64))  # 16 values are 32 bytes; the address counts sixteens
      outs = ", ".join(f"${i}" for i in range(count))
      first = count if sums is None else 2 * count
      regs = ", ".join(f"${first + i}" for i in range(4))
      text = (
        f"wgmma.mma_async.sync.aligned.m64n{block_m}k16.f32.{dtype}.{dtype} "
        f"{{{outs}}}, {{{regs}}}, ${first + 4}, {0 if sums is None else 1}, 1, 1, 0;"
      )
      tied = "" if sums is None else "," + ",".join(str(i) for i in range(count))
      constraints = ",".join(["=f"] * count) + tied + ",r,r,r,r,l"
      sums = _asm([f32] * count, [*(sums or []), *a, b], text, constraints)
    _asm_void("wgmma.commit_group.sync.aligned;")
    return _accumulator(sums, shape)

  arg_types = (Layout.WGMMA, plgpu.RefType(_X_TRANSFORMS)) + (() if acc is None else (Layout.WGMMA,))
  out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=Layout.WGMMA)
  args = (w, x_smem) if acc is None else (w, x_smem, acc)
  return plgpu.inline_mgpu(arg_types=arg_types, return_type=out)(issue)(*args)


def _asm_void(text):
  llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, "", has_side_effects=True)


def _mma_wait(*accs):
  """The accumulators, once every started wgmma is done: they pass through the wait, so that no use precedes it."""
  shape = accs[0].shape

  def wait(ctx, *accs):
    del ctx
    scalars = [s for acc in accs for s in _scalars(acc)]
    count = len(scalars)
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)])
    done = _asm([ir.F32Type.get()] * count, scalars, "wgmma.wait_group.sync.aligned 0;", constraints)
    each = count // len(accs)
    return tuple(_accumulator(done[i * each : (i + 1) * each], shape) for i in range(len(accs)))

  out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=Layout.WGMMA)
  types = (Layout.WGMMA,) * len(accs)
  return plgpu.inline_mgpu(arg_types=types, return_type=(out,) * len(accs))(wait)(*accs)


def _store_transposed(acc, y_smem):
  """y_smem[m, n] = acc[n, m], element by element: once a program, and row-major is what TMA clips at any M and N."""

  def store(ctx, acc, y_ref):
    del ctx
    index = ir.IndexType.get()
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.c(128, ir.IntegerType.get_signless(32)))
    thread = arith.index_cast(index, thread)
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

  plgpu.inline_mgpu(arg_types=(Layout.WGMMA, plgpu.RefType(())))(store)(acc, y_smem)


# --- the kernel ----------------------------------------------------------------------------------------------------


def _warpgroup_barrier():
  """All 128 threads are here: a cluster barrier counts one thread of them, which must not run ahead of the others."""

  @plgpu.inline_mgpu()
  def barrier(ctx):
    del ctx
    mgpu.utils.warpgroup_barrier()

  barrier()


def _kernel(x_gmem, w_gmem, s_gmem, y_gmem, x_smem, w_smem, s_smem, y_smem, full, empty, *, config, problem, k_tiles):
  """y[sk, m, n] = sum over the sk-th run of k of x[m, k] * s[k // group, n] * (code[k, n] - 8).

  One program: block_n columns x block_m rows x one of split_k runs of K, a run of block_k steps in a ring of stages.

    copying warpgroup       wait for `empty`, start three TMA copies (words, x, scales) that arrive on `full`
    computing warpgroup     wgmma of tile t on 64 columns . x^T   (asynchronous)
      (one for each            decode tile t + 1: 16 bytes a thread, shift, lop3, subtract -> registers of fragment A
      64 columns)           wait for tile t; after the last tile of a group, sum += partial * scale

  Out of range, TMA reads zeros and writes nothing: x and scales are zero there, whatever the codes.
  """
  c = config
  compute_wgs, stages = c.num_compute_warpgroups, c.num_stages
  tiles = c.block_k // layout.TILE
  wg, nb, mb, sk = (lax.axis_index(name) for name in ("wg", "n", "m", "k"))
  if c.cluster > 1:
    nb = nb * c.cluster + lax.axis_index("pair")
  steps_total = -(-k_tiles // tiles)
  steps_each = -(-steps_total // c.split_k)
  first_step = sk * steps_each
  steps = jnp.minimum(steps_each, steps_total - first_step)
  group_size = _group_size(problem, c)
  runs = max(1, c.block_k // group_size)  # scale groups in a step
  dtype = problem.dtype

  @pl.when(wg == compute_wgs)
  def copy():
    plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

    @pl.loop(0, steps)
    def _(t):
      stage, step = lax.rem(t, stages), first_step + t

      @pl.when(t >= stages)
      def _():
        plgpu.barrier_wait(empty.at[stage])

      plgpu.copy_gmem_to_smem(
        w_gmem.at[pl.ds(nb * compute_wgs, compute_wgs), pl.ds(step * tiles, tiles)], w_smem.at[stage], full.at[stage]
      )
      plgpu.copy_gmem_to_smem(
        x_gmem.at[pl.ds(mb * c.block_m, c.block_m), pl.ds(step * c.block_k, c.block_k)],
        x_smem.at[stage],
        full.at[stage],
        collective_axes="pair" if c.cluster > 1 else None,
      )
      group = 0 if problem.group_size == problem.k else step * c.block_k // group_size
      plgpu.copy_gmem_to_smem(
        s_gmem.at[pl.ds(group, runs), pl.ds(nb * c.block_n, c.block_n)], s_smem.at[stage], full.at[stage]
      )

  @pl.when(wg < compute_wgs)
  def compute():
    plgpu.set_max_registers(c.compute_registers, action="increase")

    def fragment(stage, tile):
      with jax.named_scope("dequantize"):
        words = plgpu.load(w_smem.at[stage, wg, tile], layout=_WORDS)
        w = _decode(words, dtype)
        return w * scale_of(stage, tile * layout.TILE, w.shape).astype(dtype) if c.scale_weights else w

    def scale_of(stage, k, shape):
      row = 0 if runs == 1 else k // group_size
      s = plgpu.load(
        s_smem.at[stage, row, pl.ds(wg * layout.TILE, layout.TILE)], layout=Layout.WGMMA.reduce(1), optimized=False
      )
      return lax.broadcast_in_dim(s if c.scale_weights else s.astype(jnp.float32), shape, [0])

    def multiply(stage, acc, w, following):
      """acc + the step's product; `w` is the fragment of its first tile, the result has that of `following`."""
      partial = acc if c.scale_weights else None
      for tile in range(tiles):
        x = x_smem.at[stage, :, pl.ds(tile * layout.TILE, layout.TILE)]
        if group_size < layout.TILE:
          started = [_mma_issue(w, x, None, k_steps=(2 * half, 2 * half + 2)) for half in range(2)]
        else:
          started = [_mma_issue(w, x, partial)]

        def decode_next(tile=tile):
          if tile + 1 < tiles:
            return fragment(stage, tile + 1)
          return None if following is None else following()

        if c.decode_ahead:
          w = decode_next()
        done = _mma_wait(*started)
        if not c.decode_ahead:
          w = decode_next()
        end = (tile + 1) * layout.TILE
        if c.scale_weights:
          acc = partial = done[0]
        elif len(done) == 2 or end % min(group_size, c.block_k) == 0 or tile + 1 == tiles:
          for half, part in enumerate(done):
            acc += part * scale_of(stage, tile * layout.TILE + 32 * half, part.shape)
          partial = None
        else:
          partial = done[0]
      return acc, w

    def release(t, stage):
      # Only if the copying warpgroup will wait for it: a program must not end while its neighbour still signals it.
      @pl.when(t + stages < steps)
      def _():
        if c.cluster > 1:
          _warpgroup_barrier()
        plgpu.barrier_arrive(empty.at[stage])

    def step(t, carry):
      acc, w = carry
      stage, next_stage = lax.rem(t, stages), lax.rem(t + 1, stages)

      def following():
        plgpu.barrier_wait(full.at[next_stage])
        return fragment(next_stage, 0)

      acc, w = multiply(stage, acc, w, following)
      release(t, stage)
      return acc, w

    plgpu.barrier_wait(full.at[0])
    zero = plgpu.layout_cast(jnp.zeros((layout.TILE, c.block_m), jnp.float32), Layout.WGMMA)
    acc, w = lax.fori_loop(0, steps - 1, step, (zero, fragment(0, 0)))
    acc, _ = multiply(lax.rem(steps - 1, stages), acc, w, None)

    with jax.named_scope("store"):
      tile = y_smem.at[wg]
      _store_transposed(acc.astype(y_gmem.dtype), tile)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        tile, y_gmem.at[sk, pl.ds(mb * c.block_m, c.block_m), pl.ds((nb * compute_wgs + wg) * layout.TILE, layout.TILE)]
      )
      plgpu.wait_smem_to_gmem(0)


def matmul_hopper(
  x: Float[Array, "M K"],
  qweight: Int16[Array, "N_tiles K_tiles 32 32"],
  scales: Float[Array, "G N"],
  *,
  config: HopperConfig,
) -> Float[Array, "M N"]:
  """y = x @ (scales * (codes - 8)), dequantized in registers, accumulated in float32; the same bits at every call.

  Args:
    x: bfloat16 or float16; M at least 1.
    qweight: packed codes (layout.py).
    scales: G = K / group_size rows, G = 1 for one group per column.
    config: block sizes; see HopperConfig.

  Raises:
    ValueError: neither of config's block_k and the group size divides the other, or config scales weights of groups
      of 32; or the stages do not fit into shared memory.
  """
  (m, k), (groups, n) = x.shape, scales.shape
  problem = MatmulProblem(m=m, n=n, k=k, group_size=k // groups, dtype=x.dtype)
  if groups > 1 and config.block_k % problem.group_size and problem.group_size % config.block_k:
    raise ValueError(f"block_k={config.block_k} and group_size={problem.group_size}: one must divide the other")
  if groups > 1 and problem.group_size < layout.TILE and config.scale_weights:
    raise ValueError(f"scale_weights needs groups of at least {layout.TILE}, not group_size={problem.group_size}")
  runs = max(1, config.block_k // _group_size(problem, config))
  config.check_shared_memory(config.block_k // runs, scales.dtype.itemsize)
  n_tiles, k_tiles, _, _ = qweight.shape
  c = config
  tiles = c.block_k // layout.TILE
  steps = -(-k_tiles // tiles)
  c = dataclasses.replace(c, split_k=-(-steps // -(-steps // c.split_k)))  # every run has a step
  # TMA reads rows of 16 bytes, x in pieces of 8 rows x 64 k; sizes that are no multiples are padded here.
  x = _pad(x, 8 if m > 8 else 1, layout.TILE)
  scales = _pad(scales, 1, 8)
  y_dtype = x.dtype if c.split_k == 1 else jnp.float32
  n_blocks = -(-n_tiles // c.num_compute_warpgroups)
  SMEM, stages = plgpu.SMEM, c.num_stages
  wgs = c.num_compute_warpgroups
  if c.cluster > 1:
    empty = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=wgs, num_barriers=stages)
    cluster = dict(cluster=(c.cluster,), cluster_names=("pair",))
  else:
    empty, cluster = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages), {}
  y = plgpu.kernel(
    functools.partial(_kernel, config=c, problem=problem, k_tiles=k_tiles),
    out_type=jax.ShapeDtypeStruct((c.split_k, m, scales.shape[1]), y_dtype),
    scratch_types=dict(
      x_smem=SMEM((stages, c.block_m, c.block_k), x.dtype, transforms=_X_TRANSFORMS),
      w_smem=SMEM((stages, wgs, tiles, 8, 128), jnp.int16),
      s_smem=SMEM((stages, runs, c.block_n), scales.dtype),
      y_smem=SMEM((wgs, c.block_m, layout.TILE), y_dtype),
      full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      empty=empty,
    ),
    grid=(-(-n_blocks // c.cluster), -(-m // c.block_m), c.split_k),
    grid_names=("n", "m", "k"),
    **cluster,
    num_threads=wgs + 1,
    thread_name="wg",
    kernel_name="w4a16_hopper",
    compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
  )(x, qweight.reshape(n_tiles, k_tiles, 8, 128), scales)
  if c.split_k > 1:
    # In the order of K, so that the result is the same at every call; XLA fuses it with what follows.
    y = y.sum(0, keepdims=True).astype(x.dtype)
  return y[0, :, :n]


def _group_size(problem: MatmulProblem, config: HopperConfig) -> int:
  """k that share a scale; a whole column has the same one in every step, however long the column is."""
  return problem.group_size if problem.group_size < problem.k else config.block_k


def _pad(array, rows: int, columns: int):
  (r, c) = array.shape
  return jnp.pad(array, ((0, -r % rows), (0, -c % columns))) if r % rows or c % columns else array
