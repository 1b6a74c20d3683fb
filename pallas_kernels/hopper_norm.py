# SPDX-License-Identifier: Apache-2.0
"""A norm of x within the product: rows are scaled where they lie in shared memory, and sums by what rows come to.

    sum over k of x[m, k] / rms(x[m]) * g[k] * w[k, n]  =  (sum over k of (x[m, k] * g[k]) * w[k, n]) / rms(x[m])

Root mean square layer normalization, arXiv 1910.07467, equation 4. The squares are added up on the way; they are all
there when the last product is, which is when they are needed.
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import layout
from pallas_kernels.hopper_fragments import X_TRANSFORMS, asm, asm_void


def scale_rows(x_smem, scale_smem, squares_smem, stage, step):
  """x_smem[stage, m, k] *= scale_smem[stage, k], rounded; squares_smem grows by the squares of what x was.

  A thread has 16 bytes at a time, always of the same row of eight. Once it returns, wgmma may read x after a barrier.

  Args:
    x_smem: [stages, block_m, block_k] bfloat16, with X_TRANSFORMS; block_k a multiple of 128.
    scale_smem: [stages, block_k / 64, 64] bfloat16.
    squares_smem: [block_m / 8, 128] float32, a place for each thread and eight rows; set where step is 0.
    stage, step: int32 scalars.
  """
  _, block_m, block_k = x_smem.shape
  k_tiles = block_k // layout.TILE

  def scale(ctx, x_ref, scale_ref, squares_ref, stage, step):
    del ctx
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    stage, step = stage.registers.item(), step.registers.item()
    thread = arith.remui(mgpu.utils.thread_idx(), _i32(128))
    # Below each other in memory: eight rows of 64 k, whose piece i of 16 bytes lies at i ^ row; then the next 64 k.
    row = arith.remui(arith.divui(thread, _i32(8)), _i32(8))
    piece = arith.xori(arith.remui(thread, _i32(8)), row)
    x = _address(x_ref, stage, block_m * block_k * 2, arith.muli(thread, _i32(16)))
    odd_tile = arith.muli(arith.divui(thread, _i32(64)), _i32(2 * layout.TILE))
    g = _address(scale_ref, stage, block_k * 2, arith.addi(odd_tile, arith.muli(piece, _i32(16))))
    first = arith.cmpi(arith.CmpIPredicate.eq, step, _i32(0))
    load = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
    for rows in range(block_m // 8):
      place = _address(squares_ref, _i32(rows), 128 * 4, arith.muli(thread, _i32(4)))
      before = asm([f32], [place], "ld.shared.f32 $0, [$1];", "=f,r")[0]
      total = arith.select(first, mgpu.c(0.0, f32), before)
      for tile in range(0, k_tiles, 2):  # two at a time: 128 threads have 64 k of sixteen rows, or 128 of eight
        here = arith.addi(x, _i32((rows * k_tiles + tile) * 8 * layout.TILE * 2))
        values = asm([i32] * 4, [here], load, "=r,=r,=r,=r,r")
        scales = asm([i32] * 4, [arith.addi(g, _i32(tile * layout.TILE * 2))], load, "=r,=r,=r,=r,r")
        scaled = []
        for value, by in zip(values, scales, strict=True):
          text = (
            "{ .reg .b32 low, high; .reg .f32 t; shl.b32 low, $2, 16; and.b32 high, $2, 0xFFFF0000;"
            " fma.rn.f32 t, low, low, $4; fma.rn.f32 $0, high, high, t; mul.rn.bf16x2 $1, $2, $3; }"
          )
          total, product = asm([f32, i32], [value, by, total], text, "=&f,=&r,r,r,f")
          scaled.append(product)
        asm_void("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", [here, *scaled], "r,r,r,r,r")
      asm_void("st.shared.f32 [$0], $1;", [place, total], "r,f")
    asm_void("fence.proxy.async.shared::cta;")
    mgpu.utils.warpgroup_barrier()  # one thread arrives on the barrier for all

  types = (plgpu.RefType(X_TRANSFORMS), plgpu.RefType(()), plgpu.RefType(())) + (plgpu.Layout.WG_SPLAT,) * 2
  plgpu.inline_mgpu(arg_types=types)(scale)(x_smem, scale_smem, squares_smem, stage, step)


def write_factors(squares_smem, factors_smem, *, features: int, epsilon: float):
  """factors_smem[m] = 1 / sqrt(sum of the squares of row m / features + epsilon), of what `scale_rows` added up.

  Once it returns, they may be read after a barrier. The order of additions never changes.
  """
  block_m = factors_smem.shape[0]

  def write(ctx, squares_ref, factors_ref):
    del ctx
    f32 = ir.F32Type.get()
    m = arith.remui(mgpu.utils.thread_idx(), _i32(128))
    with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.slt, m, _i32(block_m))):
      # Of eight rows: eight threads of each, then eight more, for the odd tiles of 64 k.
      place = arith.muli(arith.remui(m, _i32(8)), _i32(8 * 4))
      squares = _address(squares_ref, arith.divui(m, _i32(8)), 128 * 4, place)
      total = mgpu.c(0.0, f32)
      for offset in (0, 16, 256, 272):
        load = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
        for value in asm([f32] * 4, [squares], load, "=f,=f,=f,=f,r"):
          total = arith.addf(total, value)
      mean = arith.addf(arith.mulf(total, mgpu.c(1 / features, f32)), mgpu.c(epsilon, f32))
      factor = asm([f32], [mean], "rsqrt.approx.ftz.f32 $0, $1;", "=f,f")[0]
      out = _address(factors_ref, m, 4, _i32(0))
      asm_void("st.shared.f32 [$0], $1;", [out, factor], "r,f")
    mgpu.utils.warpgroup_barrier()  # one thread arrives on the barrier for all

  plgpu.inline_mgpu(arg_types=(plgpu.RefType(()), plgpu.RefType(())))(write)(squares_smem, factors_smem)


def _address(ref, index, nbytes_each: int, offset):
  base = llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))
  return arith.addi(arith.addi(base, arith.muli(index, _i32(nbytes_each))), offset)


def _i32(value: int):
  return mgpu.c(value, ir.IntegerType.get_signless(32))
