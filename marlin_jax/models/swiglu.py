# SPDX-License-Identifier: Apache-2.0
"""The gate and up projections of a gated MLP as one quantized product that gates its own result."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from marlin_jax.nnx import QuantLinear
from marlin_jax.packing import deinterleave, interleave
from pallas_kernels import DeferredNorm, layout


class QuantSwiGLU(QuantLinear):
  """y = silu(x @ gate) * (x @ up), as one layer of the interleaved columns of both; a kernel gates its float32 sums.

  Made by `fuse`. `out_features` counts the columns of the product, twice those of the result.
  """

  @classmethod
  def of(cls, gate: QuantLinear, up: QuantLinear) -> "QuantSwiGLU":
    """The layer of two projections of the same input.

    Raises:
      ValueError: one of them has a bias, they differ in dtype, or their weights cannot stand in one matrix
        (`packing.interleave`).
    """
    if (gate.bias is None) != (up.bias is None) or gate.dtype != up.dtype:
      raise ValueError("gate and up must both have a bias or neither, and be of one dtype")
    bias = None
    if gate.bias is not None:
      both = jnp.concatenate([gate.bias[...], up.bias[...]], axis=-1)
      bias = nnx.Param(both[..., layout.gated_order(both.shape[-1])])
    return cls.from_packed(interleave(gate.packed, up.packed), bias, dtype=gate.dtype)

  def apart(self) -> tuple[QuantLinear, QuantLinear]:
    """The gate and the up projection that it was made of."""
    weights = deinterleave(self.packed)
    biases = (None, None)
    if self.bias is not None:
      both = jnp.zeros_like(self.bias[...]).at[..., layout.gated_order(self.out_features)].set(self.bias[...])
      biases = tuple(nnx.Param(half) for half in jnp.split(both, 2, axis=-1))
    gate, up = (
      QuantLinear.from_packed(weight, bias, dtype=self.dtype) for weight, bias in zip(weights, biases, strict=True)
    )
    return gate, up

  def __call__(self, x: Float[Array, "*batch K"] | DeferredNorm) -> Float[Array, "*batch half_N"]:
    """silu(x @ gate) * (x @ up) with the biases, if there are any; see `marlin_jax.quant_matmul` for the errors."""
    return self._multiply(x, None, None, gated=True)
