# SPDX-License-Identifier: Apache-2.0
"""Residual addition and root-mean-square norm in one Triton-lowered kernel, where XLA makes two and a gap."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float


def _kernel(x_ref, delta_ref, scale_ref, sum_ref, y_ref, *, epsilon):
  """One row: sum = x + delta, rounded as it will be read; y = sum / sqrt(mean(sum^2) + epsilon) * scale, in float32."""
  features = x_ref.shape[1]
  row = pl.program_id(0)
  width = 1 << (features - 1).bit_length()
  inside = jnp.arange(width) < features
  mask, fill = (None, None) if width == features else (inside, 0.0)

  def load(index):
    return plt.load(index, mask=mask, other=fill)

  # First of all: it comes from memory, and after the sum over the row its latency would be waited for once more.
  scale = load(scale_ref.at[pl.ds(0, width)]).astype(jnp.float32)
  total = load(x_ref.at[row, pl.ds(0, width)]) + load(delta_ref.at[row, pl.ds(0, width)])
  plt.store(sum_ref.at[row, pl.ds(0, width)], total, mask=mask)
  total = total.astype(jnp.float32)
  mean_square = jnp.sum(total * total) / features
  y = total * (lax.rsqrt(mean_square + epsilon) * scale)
  plt.store(y_ref.at[row, pl.ds(0, width)], y.astype(y_ref.dtype), mask=mask)


@functools.partial(jax.jit, static_argnames=("epsilon", "interpret"))
def add_norm(
  x: Float[Array, "M E"],
  delta: Float[Array, "M E"],
  scale: Float[Array, " E"],
  *,
  epsilon: float,
  interpret: bool = False,
) -> tuple[Float[Array, "M E"], Float[Array, "M E"]]:
  """(s, s / sqrt(mean(s^2) + epsilon) * scale) with s = x + delta in x's dtype, the norm in float32.

  Args:
    x, delta: of one dtype.
    scale: of the norm; any float dtype.
    epsilon: keeps a row of zeros finite.
    interpret: run the kernel's body on the CPU, for tests.
  """
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return pl.pallas_call(
    functools.partial(_kernel, epsilon=epsilon),
    out_shape=(shape, shape),
    grid=(x.shape[0],),
    compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
    interpret=interpret,
    name="add_norm",
  )(x, delta, scale)
