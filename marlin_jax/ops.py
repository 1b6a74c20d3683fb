# SPDX-License-Identifier: Apache-2.0
"""The matmul of a layer: leading batch dimensions around the kernel's two-dimensional product."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from marlin_jax.quantized import Packed
from pallas_kernels import DeferredNorm, after_attention, matmul


def quant_matmul(
  x: Float[Array, "*batch K"] | DeferredNorm,
  w: Packed,
  bias: Float[Array, " N"] | None = None,
  residual: Float[Array, "*batch N_out"] | None = None,
  *,
  norm: tuple[Float[Array, " N_out"], float] | None = None,
  gated: bool = False,
  implementation: str | None = None,
) -> Float[Array, "*batch N_out"] | tuple[Float[Array, "*batch N_out"], Float[Array, "*batch N_out"] | DeferredNorm]:
  """y[..., n] = sum_k x[..., k] * w[k, n] + bias[n] + residual[..., n], summed in float32, rounded to x's dtype.

  For inference: there is no gradient rule, differentiating it raises.

  Args:
    x: bfloat16 or float16 (float32 too on the CPU); any number of leading dimensions, of any size.
    w: the packed weight, dense or 2:4 sparse. With a permutation, x is gathered before the product.
    bias: any float dtype.
    residual: added last, in x's dtype.
    norm: (scale, epsilon) of a norm of y, to be returned beside it; see `pallas_kernels.matmul`.
    gated: w is of `packing.interleave(gate, up)`, and y is silu(gate) * up of N / 2 columns.
    implementation: see `pallas_kernels.matmul`; None picks the kernel of the device, or the reference without a GPU.

  Raises:
    ValueError: x's last dimension is not K, or w is a stack of weights.
    NotImplementedError: no kernel covers this on the GPU at hand, or the implementation named does not; it says why.
  """
  if x.shape[-1] != w.k:
    raise ValueError(f"x has {x.shape[-1]} features, the weight has K={w.k}")
  if w.stack:
    raise ValueError(f"w is a stack {w.stack} of weights, must be one of them")
  *batch, k = x.shape
  rows = math.prod(batch)

  def flat(x: Array) -> Array:
    if w.permutation is not None:
      x = jnp.take(x, w.permutation, axis=-1, unique_indices=True, mode="clip")
    return x.reshape(rows, k)

  # A mean square is that of the features in any order.
  x = dataclasses.replace(x, scaled=flat(x.scaled)) if isinstance(x, DeferredNorm) else flat(x)
  residual = None if residual is None else residual.reshape(rows, residual.shape[-1])
  options = dict(norm=norm, gated=gated, implementation=implementation)
  y = matmul(x, w.qweight, w.scales, w.zeros, w.meta, bias, residual, **options)
  if norm is None:
    return y.reshape(*batch, y.shape[1])
  y, normed = y
  shape = (*batch, y.shape[1])
  return y.reshape(shape), _in_batches(normed, shape)


def quant_after_attention(
  x: Float[Array, "*batch K"],
  residual: Float[Array, "*batch E"],
  weights: tuple[Packed, Packed, Packed, Packed],
  norms: tuple[tuple[Float[Array, " E"], float], tuple[Float[Array, " E"], float]],
  bias: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "*batch E"], Float[Array, "*batch E"] | DeferredNorm, Float[Array, "*batch N"]]:
  """(s, norm(s), norm(s) @ reader + bias) with s = t + SwiGLU(norm(t) @ gate_up) @ down, t = residual + x @ output.

  Args:
    x: what attention made, in residual's dtype.
    weights: output, gate_up (as `packing.interleave` makes it), down and reader, without permutations.
    norms: (scale, epsilon) of the norm of t and of that of s.
    bias: of the reader.

  Raises: as `pallas_kernels.after_attention`.
  """
  flat = [array.reshape(-1, array.shape[-1]) for array in (x, residual)]
  arrays = tuple((w.qweight, w.scales, w.zeros, w.meta) for w in weights)
  s, normed, y = after_attention(*flat, arrays, norms, bias)
  return s.reshape(residual.shape), _in_batches(normed, residual.shape), y.reshape(*x.shape[:-1], -1)


def _in_batches(normed: Array | DeferredNorm, shape: tuple[int, ...]) -> Array | DeferredNorm:
  if isinstance(normed, DeferredNorm):
    return dataclasses.replace(normed, scaled=normed.scaled.reshape(shape))
  return normed.reshape(shape)
