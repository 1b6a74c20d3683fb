# SPDX-License-Identifier: Apache-2.0
"""Your own layers in 4 bits: a Linen model with QuantDense, an NNX model with QuantLinear.

    python examples/02_one_layer.py

An optimizer that takes parameters sees the biases only: the packed weights live in the collection "quant" (Linen) or
are of the Variable type QuantParam (NNX).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx, traverse_util

from marlin_jax import QuantDense, QuantParam, QuantSpec, quantize, quantize_variables

x = jax.random.normal(jax.random.key(0), (4, 7, 256), jnp.bfloat16)


def relative_error(y: jax.Array, expected: jax.Array) -> float:
  """|y - expected| / |expected|, root mean square over all elements."""
  y, expected = y.astype(jnp.float32), expected.astype(jnp.float32)
  return float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))


class LinenMLP(nn.Module):
  """The dense layer is an argument. Both kinds need the same names, or their variables would not fit."""

  dense: type[nn.Module] | partial = nn.Dense

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(self.dense(1024, dtype=jnp.bfloat16, name="up")(x))
    return self.dense(256, dtype=jnp.bfloat16, name="down")(x)


class NnxMLP(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.up = nnx.Linear(256, 1024, dtype=jnp.bfloat16, rngs=rngs)
    self.down = nnx.Linear(1024, 256, dtype=jnp.bfloat16, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.gelu(self.up(x)))


variables = LinenMLP().init(jax.random.key(1), x)  # or what training gave
spec = QuantSpec(bits=4, group_size=128)
quantized_variables, report = quantize_variables(variables, spec)
quantized_model = LinenMLP(dense=partial(QuantDense, spec=spec))
linen_error = relative_error(
  jax.jit(quantized_model.apply)(quantized_variables, x), jax.jit(LinenMLP().apply)(variables, x)
)
print(f"Linen: {report}; outputs differ by {linen_error:.1%}")
for collection, values in quantized_variables.items():
  print(f"  {collection}: {', '.join(traverse_util.flatten_dict(values, sep='.'))}")

model = NnxMLP(nnx.Rngs(1))
expected = nnx.jit(model)(x)
quantize(model, bits=4, group_size=128, progress=False)  # in place: nnx.Linear becomes QuantLinear
nnx_error = relative_error(nnx.jit(model)(x), expected)
print(f"NNX: outputs differ by {nnx_error:.1%}")
for kind in (nnx.Param, QuantParam):
  print(f"  {kind.__name__}: {', '.join('.'.join(path) for path, _ in nnx.to_flat_state(nnx.state(model, kind)))}")
