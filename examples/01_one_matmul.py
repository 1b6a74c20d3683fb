# SPDX-License-Identifier: Apache-2.0
"""One matmul: a random weight goes to 4 bits, into the kernel's order, and through the product.

    python examples/01_one_matmul.py

Runs anywhere; with an NVIDIA GPU the Pallas kernel multiplies, elsewhere plain JAX.
"""

import jax
import jax.numpy as jnp
import numpy as np

from marlin_jax import QuantSpec, pack, quant_matmul, quantize_rtn
from pallas_kernels import MatmulProblem, choose_implementation, current_device

m, k, n = 16, 1024, 512
key_x, key_w = jax.random.split(jax.random.key(0))
x = jax.random.normal(key_x, (m, k), jnp.bfloat16)
w = jax.random.normal(key_w, (k, n), jnp.bfloat16)

quantized = quantize_rtn(w, QuantSpec(bits=4, group_size=128))  # codes 0..15, one scale for 128 weights of a column
packed = pack(quantized)  # the same codes in the order that the kernel reads
y = quant_matmul(x, packed)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
  """x @ w in float32 throughout: by default a GPU multiplies float32 with fewer bits."""
  return jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def relative_error(y: jax.Array, expected: jax.Array) -> float:
  """|y - expected| / |expected|, root mean square over all elements."""
  return float(jnp.linalg.norm(y.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


problem = MatmulProblem(m=m, n=n, k=k, group_size=packed.group_size, dtype=np.dtype(x.dtype))
implementation = choose_implementation(problem)
from_quantization = relative_error(y, product(x, w))
from_arithmetic = relative_error(y, product(x, quantized.dequantize()))

print(f"x {x.shape} @ w {w.shape} in {y.dtype}: implementation {implementation!r} on {current_device().kind}")
print(f"weight: {w.nbytes} bytes -> {packed.nbytes}, {8 * packed.nbytes / w.size:.3f} bits a weight with its scales")
print(f"error against the float weight:          {from_quantization:.2%}  (what 4 bits cost on Gaussian weights)")
print(f"error against the same weight in 4 bits: {from_arithmetic:.2%}  (what rounding the result to bfloat16 costs)")
