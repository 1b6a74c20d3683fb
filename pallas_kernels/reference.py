# SPDX-License-Identifier: Apache-2.0
"""The specification of the product in plain jnp: the oracle of every kernel test, and the path where no GPU is.

    y[m, n] = sum_k x[m, k] * scales[k // group_size, n] * (codes[k, n] - zeros[k // group_size, n])
              + bias[n] + residual[m, n]

Without zeros every zero point is the middle code, 2^(bits - 1). Weight and sum are float32, rounded once, to x's dtype.
A 2:4 sparse weight is the dense one with the codes of zero that were not stored.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int16, UInt8

from pallas_kernels import layout, layout24
from pallas_kernels.hardware import Device
from pallas_kernels.problem import MatmulProblem


def dequantize(
  codes: UInt8[Array, "K N"], scales: Float[Array, "G N"], zeros: Float[Array, "G N"] | None = None, bits: int = 4
) -> Float32[Array, "K N"]:
  """w[k, n] = scales[k // (K / G), n] * (codes[k, n] - zeros[k // (K / G), n]) in float32.

  Exact with scales in 16 bits and integer zero points; None is 2^(bits - 1) everywhere.
  """
  k, n = codes.shape
  grouped = codes.reshape(scales.shape[0], -1, n).astype(jnp.float32)
  grouped -= layout.zero_code(bits) if zeros is None else zeros.astype(jnp.float32)[:, None]
  return (grouped * scales.astype(jnp.float32)[:, None]).reshape(k, n)


def unsupported_reason(problem: MatmulProblem, device: Device) -> str | None:
  """None: the specification covers every problem, on every device."""
  del problem, device


def matmul_reference(
  x: Float[Array, "M K"],
  qweight: Int16[Array, "N_tiles K_tiles rows 32"],
  scales: Float[Array, "G N"],
  zeros: Float[Array, "G N"] | None = None,
  meta: Int16[Array, "_ _ 32 16"] | None = None,
  bias: Float[Array, " N"] | None = None,
  residual: Float[Array, "M N_out"] | None = None,
  *,
  gated: bool = False,
) -> Float[Array, "M N_out"]:
  """y = x @ dequantize(unpack(qweight, meta), scales, zeros) + bias + residual in float32, rounded once to x.dtype.

  If gated, `gate` of all before the residual takes its place.
  """
  k, n = x.shape[1], scales.shape[1]
  codes = layout.unpack_codes(qweight, k, n) if meta is None else layout24.unpack_codes(qweight, meta, k, n)
  w = dequantize(codes, scales, zeros, bits=qweight.shape[2] // 8)
  y = jnp.dot(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
  y = y if bias is None else y + bias.astype(jnp.float32)
  y = gate(y) if gated else y
  return (y if residual is None else y + residual.astype(jnp.float32)).astype(x.dtype)


def rms_norm(x: Float[Array, "M K"], scale: Float[Array, " K"], epsilon: float) -> Float[Array, "M K"]:
  """x / sqrt(mean(x^2) + epsilon) * scale in float32, rounded to x's dtype: arXiv 1910.07467, equation 4."""
  wide = x.astype(jnp.float32)
  factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
  return (wide * (factor * scale.astype(jnp.float32))).astype(x.dtype)


def gate(y: Float[Array, "M N"]) -> Float[Array, "M N_out"]:
  """silu(gate) * up of gated columns (layout.py), in float32, rounded once: SwiGLU, arXiv 2002.05202, section 2."""
  gates, ups = jnp.moveaxis(y.astype(jnp.float32).reshape(y.shape[0], -1, 2, 8), 2, 0)
  return (jax.nn.silu(gates) * ups).reshape(y.shape[0], -1).astype(y.dtype)
