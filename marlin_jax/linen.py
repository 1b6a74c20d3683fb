# SPDX-License-Identifier: Apache-2.0
"""QuantDense: the Flax Linen layer, a drop-in for `nn.Dense` in inference."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from marlin_jax.nnx import quantize_and_pack
from marlin_jax.ops import quant_matmul
from marlin_jax.quantized import PACKED_FIELDS, QuantSpec, arrays_of, packed_of


class QuantDense(nn.Module):
  """y[..., n] = sum_k x[..., k] * w[k, n] + bias[n] with w in 4 or 8 bits.

  The packed weight lives in the collection "quant" (`qweight`, `scales`, and `zeros` or `meta` if there are any), the
  bias in "params": an optimizer that takes "params" leaves the weight alone. `marlin_jax.quantize_variables` makes the
  collection from trained `nn.Dense` variables; `init` gives a quantized random kernel. Name the layer as the `nn.Dense`
  was named (without a name, Linen counts classes, and `Dense_0` becomes `QuantDense_0`).

  Attributes:
    features: N.
    use_bias: whether there is a bias.
    dtype: x and bias are cast to it and the result has it; None keeps x's own dtype.
    param_dtype: of scales and bias.
    kernel_init, bias_init: initialisers, as for nn.Dense.
    spec: bits, group size, symmetry and sparsity; only `init` reads it.
  """

  features: int
  use_bias: bool = True
  dtype: DTypeLike | None = None
  param_dtype: DTypeLike = jnp.float32
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
  spec: QuantSpec = QuantSpec()

  @nn.compact
  def __call__(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch N"]:
    """y = x @ w + bias; see `marlin_jax.quant_matmul` for the errors."""
    k = x.shape[-1]
    if self.is_initializing():
      w = self.kernel_init(self.make_rng("params"), (k, self.features), self.param_dtype)
      for name, array in arrays_of(quantize_and_pack(w, self.spec)).items():
        self.put_variable("quant", name, array)
    fields = {name: self.get_variable("quant", name) for name in PACKED_FIELDS if self.has_variable("quant", name)}
    bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
    x = x if self.dtype is None else x.astype(self.dtype)
    return quant_matmul(x, packed_of(k, fields), bias)
