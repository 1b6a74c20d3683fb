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
from pallas_kernels.hopper_operands import emptied, pad, ring, rows_of_x, scratch, weight_operands, y_smem
from pallas_kernels.hopper_program import program
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
    scales: G = K / group_size rows, G = 1 for one group per column. Where config scales weights, less than 2**34.
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
      half a tile; block_k is too short for its tiles, or K for blocks that take turns; the stages do not fit into
      shared memory; or programs that share a block are no cluster.
  """
  (m, k), (groups, n) = x.shape, scales.shape
  kind = dict(bits=qweight.shape[2] // 8, zeros=zeros is not None, sparse24=meta is not None)
  problem = MatmulProblem(m=m, n=n, k=k, group_size=k // groups, dtype=x.dtype, **kind)
  if reason := config.unfit_reason(problem):
    raise ValueError(reason)
  if config.meets_in_memory:
    raise ValueError(f"split_k={config.split_k} must be 1, 2 or 4 but in ChainConfig")
  c = config
  copied = dict(x=pad(x, rows_of_x(m), layout.TILE)) | weight_operands(qweight, scales, zeros, meta, x.dtype)
  others = dict(
    bias=None if bias is None else pad(bias[None], 1, c.block_n)[0],
    residual=None if residual is None else pad(residual, 1, 8),
    squares=squares,
    norm=norm,
  )
  operands = copied | {name: operand for name, operand in others.items() if operand is not None}
  stages, sums = ring(c, problem, scales.dtype), y_smem(c, problem)
  y_out = jax.ShapeDtypeStruct((m, copied["scales"].shape[1] // (1 + gated)), x.dtype)
  outputs = (y_out,) if norm is None else (y_out, y_out, jax.ShapeDtypeStruct((qweight.shape[0], m), jnp.float32))
  y, *others = plgpu.kernel(
    functools.partial(program, names=tuple(operands), config=c, problem=problem, gated=gated, epsilon=epsilon),
    out_type=outputs,
    scratch_types=[
      plgpu.RefUnion(stages, sums) if c.y_in_ring else (stages, sums),
      scratch(c, problem, normalized=squares is not None) | dict(empty=emptied(c)),
    ],
    grid=(min(c.programs or c.blocks(problem), c.blocks(problem)),),
    grid_names=("block",),
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
