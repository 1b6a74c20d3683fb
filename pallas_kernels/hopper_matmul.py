# SPDX-License-Identifier: Apache-2.0
"""The Mosaic GPU kernel for Hopper: weights as the register operand of wgmma, the batch as its narrow side."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int16

from pallas_kernels import layout
from pallas_kernels.hardware import Device
from pallas_kernels.hopper_config import HopperConfig
from pallas_kernels.hopper_fragments import X_TRANSFORMS
from pallas_kernels.hopper_program import program
from pallas_kernels.hopper_reduce import PITCH
from pallas_kernels.problem import MatmulProblem


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
  if max(problem.k * problem.n // 4, problem.m * problem.k, problem.m * problem.n) >= 2**31:
    return "an operand of 2^31 elements or more is not tested"
  tile = problem.tile_k
  if problem.group_size != tile // 2 and problem.group_size % tile and problem.group_size != problem.k:
    return f"group_size={problem.group_size} must be {tile // 2}, a multiple of {tile} or the whole column"
  if problem.zeros and problem.group_size < min(layout.TILE, problem.k):
    return f"zero points need groups of at least {layout.TILE}, not group_size={problem.group_size}"
  return None


# A jit of its own: the layers of a model that are of one shape then share one trace, one lowering and one compilation
# of the kernel. Without it 56 layers took more than a minute, most of it in lowering.
@functools.partial(jax.jit, static_argnames=("epsilon", "gated", "config"))
def matmul_hopper(
  x: Float[Array, "M K"],
  qweight: Int16[Array, "N_tiles K_tiles rows 32"],
  scales: Float[Array, "G N"],
  zeros: Float[Array, "G N"] | None = None,
  meta: Int16[Array, "N_tiles K_tiles 32 16"] | None = None,
  bias: Float[Array, " N"] | None = None,
  residual: Float[Array, "M N_out"] | None = None,
  squares: Float32[Array, "T M"] | None = None,
  norm: Float[Array, " N"] | None = None,
  *,
  epsilon: float = 0.0,
  gated: bool = False,
  config: HopperConfig,
) -> Float[Array, "M N_out"] | tuple[Float[Array, "M N"], Float[Array, "M N"], Float32[Array, "N_tiles M"]]:
  """y = x @ (scales * (codes - zeros)) + bias + residual, dequantized in registers, summed in float32.

  The same bits at every call. 2:4 sparse weights go to sparse tensor cores: x is not multiplied where one is pruned,
  not even if it is Inf.

  Args:
    x: bfloat16 or float16; M at least 1.
    qweight: packed codes of 4 or 8 bits (layout.py), or the kept ones (layout24.py).
    scales: G = K / group_size rows, G = 1 for one group per column.
    zeros: zero points, like scales, rounded to x's dtype; None is the middle code.
    meta: positions of kept codes (layout24.py); None of a dense weight.
    bias: added in float32, before rounding.
    residual: added to what is said here, last; x's dtype.
    squares: sums of the squares of what x stands for before a norm, which is x / sqrt(sum(squares) / K + epsilon).
    norm: the scale of a norm that comes after, in x's dtype; N must be a multiple of 64 and nothing gated.
    epsilon: of the norm before.
    gated: columns are gates and ups in turns (layout.py), and y is silu(gate) * up, N / 2 columns.
    config: block sizes; see HopperConfig.

  Returns:
    y; with norm (y, y * norm, the sums of the squares of y, 64 columns each), of y before it is rounded.

  Raises:
    ValueError: neither of config's block_k and the group size divides the other, config scales weights of groups of
      half a tile or sums zeros that there are not; block_k is too short for its tiles, or the stages do not fit into
      shared memory.
  """
  (m, k), (groups, n) = x.shape, scales.shape
  n_tiles, k_tiles, rows, _ = qweight.shape
  kind = dict(bits=rows // 8, zeros=zeros is not None, sparse24=meta is not None)
  problem = MatmulProblem(m=m, n=n, k=k, group_size=k // groups, dtype=x.dtype, **kind)
  if reason := config.unfit_reason(problem):
    raise ValueError(reason)
  c = config
  runs = c.groups_per_stage(problem)
  tiles, planes = c.block_k // problem.tile_k, problem.bits // 4
  # TMA reads rows of 16 bytes, x in pieces of 8 rows x 64 k; sizes that are no multiples are padded here.
  copied = dict(
    x=_pad(x, 8 if m > 8 else 1, layout.TILE),
    words=qweight.reshape(n_tiles, k_tiles, planes, 8, 128),
    scales=_pad(scales, 1, 8),
    zeros=None if zeros is None else _pad(zeros.astype(x.dtype), 1, 8),
    meta=None if meta is None else meta.reshape(n_tiles, k_tiles, 4, 128),
  )
  copied = {name: operand for name, operand in copied.items() if operand is not None}
  others = dict(
    bias=None if bias is None else _pad(bias[None], 1, c.block_n)[0],
    residual=None if residual is None else _pad(residual, 1, 8),
    squares=squares,
    norm=norm,
  )
  operands = copied | {name: operand for name, operand in others.items() if operand is not None}
  SMEM, stages = plgpu.SMEM, c.num_stages
  y_dtype = jnp.dtype(jnp.float32) if c.reduces else x.dtype
  barrier = plgpu.Barrier
  if c.split_k > 1:
    barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("k",))
  ring = dict(
    x=SMEM((stages, c.block_m, c.block_k), x.dtype, transforms=X_TRANSFORMS),
    words=SMEM((stages, c.warpgroups_n, tiles, planes, 8, 128), jnp.int16),
    scales=SMEM((stages, runs, c.block_n), scales.dtype),
    zeros=SMEM((stages, runs, c.block_n), x.dtype),
    meta=SMEM((stages, c.warpgroups_n, tiles, 4, 128), jnp.int16),
  )
  ring = {name: ring[name] for name in copied}
  y_smem = SMEM((c.compute_warpgroups, c.block_m, PITCH[y_dtype.itemsize]), y_dtype)
  y_out = jax.ShapeDtypeStruct((m, copied["scales"].shape[1] // (1 + gated)), x.dtype)
  outputs = (y_out,) if norm is None else (y_out, y_out, jax.ShapeDtypeStruct((n_tiles, m), jnp.float32))
  y, *others = plgpu.kernel(
    functools.partial(
      program, names=tuple(operands), config=c, problem=problem, gated=gated, k_tiles=k_tiles, epsilon=epsilon
    ),
    out_type=outputs,
    scratch_types=[
      plgpu.RefUnion(ring, y_smem) if c.y_in_ring else (ring, y_smem),
      plgpu.Barrier(num_arrivals=len(copied), num_barriers=stages),
      plgpu.Barrier(num_arrivals=c.compute_warpgroups, num_barriers=stages),
      barrier(num_arrivals=c.warpgroups_k, num_barriers=c.warpgroups_n),
      barrier(num_arrivals=c.warpgroups_k, num_barriers=c.warpgroups_n),
      plgpu.Barrier(num_arrivals=c.compute_warpgroups),
      SMEM((stages, c.block_k // c.segment(problem), c.block_m) if c.sum_zeros else (1, 1, 8), jnp.float32),
      plgpu.Barrier(num_arrivals=1, num_barriers=stages),
      () if squares is None else (SMEM((128,), jnp.float32), SMEM((c.block_m,), jnp.float32)),
      plgpu.Barrier(num_arrivals=1),
    ],
    grid=(-(-n_tiles // c.warpgroups_n), -(-m // c.block_m)),
    grid_names=("n", "m"),
    cluster=(c.split_k,) if c.split_k > 1 else (),
    cluster_names=("k",) if c.split_k > 1 else (),
    num_threads=c.warpgroups,
    thread_name="wg",
    kernel_name=f"w{problem.bits}a16_{'sparse24_' if problem.sparse24 else ''}hopper",
    compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
  )(*operands.values())
  y = y[:, : n // (1 + gated)]
  return y if norm is None else (y, *others)


def _pad(array, rows: int, columns: int):
  (r, c) = array.shape
  return jnp.pad(array, ((0, -r % rows), (0, -c % columns))) if r % rows or c % columns else array
