# SPDX-License-Identifier: Apache-2.0
"""The product of many rows through a 16-bit copy of the weight: a Triton-lowered kernel writes it, XLA multiplies.

The fused kernels (triton_matmul.py, triton_matmul24.py) decode a weight once for each block of rows of x; here it is
decoded once, into a copy of 2 bytes a weight that lives as long as the product.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int16

from pallas_kernels import layout, triton_matmul, triton_matmul24
from pallas_kernels.hardware import Device
from pallas_kernels.problem import MatmulProblem


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DequantizeConfig:
  """What one program writes.

  Attributes:
    block_n: columns, a multiple of the layout's 64 that is a power of two.
    block_k: k, 64 or 128; 128 of 2:4 sparse weights.
    num_warps: threads / 32.
  """

  block_n: int
  block_k: int
  num_warps: int

  def __post_init__(self):
    for name, allowed in dict(block_n=(64, 128, 256), block_k=(64, 128), num_warps=(1, 2, 4, 8, 16)).items():
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name}={getattr(self, name)} must be one of {allowed}")


def unsupported_reason(problem: MatmulProblem, device: Device) -> str | None:
  """Why this cannot take `problem` on `device`, None if it can: what the fused kernel says, and the copy's size."""
  fused = triton_matmul24 if problem.sparse24 else triton_matmul
  if reason := fused.unsupported_reason(problem, device):
    return reason
  k, n = layout.padded_shape(problem.k, problem.n)
  if k * n > triton_matmul.MAX_ELEMENTS:
    return f"a dequantized weight of {k} x {n} has more than 2^31 elements"
  return None


def _kernel(*refs, problem, config, use_asm):
  """w[n, k] = s[k // group, n] * (code[k, n] - z[k // group, n]), rounded once to x's dtype.

  One program: block_n rows of w x block_k. There is no loop: programs beside each other hide each other's loads.

    load    words of the block, 16 bytes a thread, and positions, if 2:4 sparse; scales and zeros of its groups
    decode  codes, in natural order of n and k, as the fused kernels do; less the zeros, in x's dtype
    scale   in float32, as [block_n, groups, k of a group]; the scale takes decoded_factor away again, exactly
    store   rows of block_k contiguous elements, 16 bytes a thread: Triton takes the fragments that were decoded through
            shared memory
  """
  word_refs, (scales_ref, *zeros_refs, w_ref) = refs[: 1 + problem.sparse24], refs[1 + problem.sparse24 :]
  c, group_size = config, problem.group_size
  step, column = pl.program_id(0), pl.program_id(1)
  n0, k0 = column * c.block_n, step * c.block_k
  # Whole groups, of which the last block may have fewer, or a part of one.
  groups, group0 = 1 if group_size == problem.k else max(1, c.block_k // group_size), lax.div(k0, group_size)

  def inside(first, size, end):
    """Where nothing sticks out there is no mask at all, so that loads and stores stay 16 bytes wide."""
    return None if end % size == 0 else first + jnp.arange(size, dtype=jnp.int32) < end

  n_inside, k_inside = inside(n0, c.block_n, problem.n), inside(k0, c.block_k, problem.k)
  group_inside = None if groups == 1 else inside(group0, groups, problem.k // group_size)

  def load_groups(ref):
    mask = _outer(group_inside, n_inside, (groups, c.block_n))
    index = ref.at[pl.ds(group0, groups), pl.ds(n0, c.block_n)]
    return plt.load(index, mask=mask, other=None if mask is None else 0.0).T[:, :, None]

  load_weights = triton_matmul24.load_weights if problem.sparse24 else triton_matmul.load_weights
  w = load_weights(*word_refs, column, step, problem=problem, config=config, use_asm=use_asm)
  w = w.reshape(c.block_n, groups, c.block_k // groups)
  decoded = triton_matmul.decoded_factor(problem)
  for zeros_ref in zeros_refs:
    w -= load_groups(zeros_ref).astype(w.dtype) * w.dtype.type(decoded)
  # In bfloat16, if codes and scales are, of whose product, rounded once, the compiler makes one instruction a pair; not
  # in float16 beside bfloat16 codes, where it might be infinite.
  scales = load_groups(scales_ref).astype(jnp.promote_types(scales_ref.dtype, w.dtype))
  scales = (scales * scales.dtype.type(1 / decoded)).astype(jnp.float32)
  w = (w.astype(jnp.float32) * scales).astype(w_ref.dtype)
  index = w_ref.at[pl.ds(n0, c.block_n), pl.ds(k0, c.block_k)]
  plt.store(index, w.reshape(c.block_n, c.block_k), mask=_outer(n_inside, k_inside, (c.block_n, c.block_k)))


def _outer(rows, columns, shape):
  """The mask of a block from those of its rows and columns, of which None is no mask."""
  masks = ([] if rows is None else [rows[:, None]]) + ([] if columns is None else [columns[None, :]])
  return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), shape) if masks else None


# A jit of its own: the layers of a model that are of one shape then share one trace and one lowering of the kernel.
@functools.partial(jax.jit, static_argnames=("k", "dtype", "config", "interpret"))
def dequantize_triton(
  qweight: Int16[Array, "N_tiles K_tiles rows 32"],
  scales: Float[Array, "G N"],
  zeros: Float[Array, "G N"] | None = None,
  meta: Int16[Array, "_ _ 32 16"] | None = None,
  *,
  k: int,
  dtype: np.dtype,
  config: DequantizeConfig,
  interpret: bool = False,
) -> Float[Array, "N {k}"]:
  """w[n, k] = scales[k // (K / G), n] * (codes[k, n] - zeros[k // (K / G), n]), transposed: k is contiguous.

  `reference.dequantize` of the unpacked codes, rounded once.

  Args:
    qweight, meta: packed codes of 4 or 8 bits (layout.py), or 2:4 sparse ones and their positions (layout24.py).
    scales: G = k / group_size rows, G = 1 for one group per column.
    zeros: zero points, as scales; None is the middle code. codes - zeros is rounded to dtype: exact for integers.
    k: rows of the weight, which are padded in qweight.
    dtype: of the result, bfloat16 or float16.
    config: block sizes; see DequantizeConfig.
    interpret: run the kernel's body on the CPU, for tests.

  Raises:
    ValueError: config does not fit the problem; see `triton_matmul.unfit_reason`.
  """
  groups, n = scales.shape
  bits = qweight.shape[2] // 8
  kind = dict(bits=bits, zeros=zeros is not None, sparse24=meta is not None)
  problem = MatmulProblem(m=0, n=n, k=k, group_size=k // groups, dtype=dtype, **kind)
  if reason := triton_matmul.unfit_reason(config, problem):
    raise ValueError(reason)
  words = triton_matmul.word_rows(qweight), *(() if meta is None else (meta.reshape(meta.shape[0], -1),))
  return pl.pallas_call(
    functools.partial(_kernel, problem=problem, config=config, use_asm=not interpret),
    out_shape=jax.ShapeDtypeStruct((n, k), dtype),
    grid=(-(-k // config.block_k), -(-n // config.block_n)),
    compiler_params=plt.CompilerParams(num_warps=config.num_warps),
    interpret=interpret,
    name=f"w{bits}_{'sparse24_' if problem.sparse24 else ''}dequantize_triton",
  )(*words, scales, *(() if zeros is None else (zeros,)))


def matmul_dequantize(
  x: Float[Array, "M K"],
  qweight: Int16[Array, "N_tiles K_tiles rows 32"],
  scales: Float[Array, "G N"],
  zeros: Float[Array, "G N"] | None = None,
  meta: Int16[Array, "_ _ 32 16"] | None = None,
  bias: Float[Array, " N"] | None = None,
  *,
  config: DequantizeConfig,
  interpret: bool = False,
) -> Float[Array, "M N"]:
  """y = x @ w + bias with w = scales * (codes - zeros) rounded to x's dtype, summed in float32 by XLA's own product.

  One rounding more than the fused Triton kernels have, the one of `HopperConfig.scale_weights`. The same bits at every
  call of a compiled program.

  Args:
    x: bfloat16 or float16.
    bias: added in float32, before rounding.
    qweight, scales, zeros, meta, config, interpret: as of `dequantize_triton`.

  Raises:
    ValueError: config does not fit the problem; see `triton_matmul.unfit_reason`.
  """
  how = dict(k=x.shape[1], dtype=x.dtype, config=config, interpret=interpret)
  w = dequantize_triton(qweight, scales, zeros, meta, **how)
  # Without a bias in x's dtype at once, as any product of XLA: 2423 instead of 2611 us at M=4096 of 8192 x 28672. But
  # of a single row XLA on a GPU may make a multiplication and a sum, each rounded to the product's dtype.
  dtype = x.dtype if bias is None and x.shape[0] > 1 else jnp.float32
  y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
  return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)
