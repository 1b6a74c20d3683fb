# SPDX-License-Identifier: Apache-2.0
"""The specification of the product in plain jnp: the oracle of every kernel test, and the path where no GPU is.

    y[m, n] = sum_k x[m, k] * scales[k // group_size, n] * (codes[k, n] - 8)

The weight is dequantized exactly, the sum is taken in float32 and rounded once, to the dtype of x.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Int16

from pallas_kernels import layout
from pallas_kernels.hardware import Device
from pallas_kernels.problem import MatmulProblem


def dequantize(codes: Int8[Array, "K N"], scales: Float[Array, "G N"]) -> Float32[Array, "K N"]:
  """w[k, n] = scales[k // (K / G), n] * (codes[k, n] - 8), exact in float32."""
  k, n = codes.shape
  grouped = codes.reshape(scales.shape[0], -1, n).astype(jnp.float32) - layout.ZERO_CODE
  return (grouped * scales.astype(jnp.float32)[:, None]).reshape(k, n)


def unsupported_reason(problem: MatmulProblem, device: Device) -> str | None:
  """None: the specification covers every problem, on every device."""
  del problem, device


def matmul_reference(
  x: Float[Array, "M K"], qweight: Int16[Array, "N_tiles K_tiles 32 32"], scales: Float[Array, "G N"]
) -> Float[Array, "M N"]:
  """y = x @ dequantize(unpack(qweight), scales), accumulated in float32, rounded once to x.dtype."""
  w = dequantize(layout.unpack_codes(qweight, x.shape[1], scales.shape[1]), scales)
  return jnp.dot(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)
