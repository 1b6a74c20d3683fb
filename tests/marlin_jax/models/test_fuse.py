# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax import QuantLinear, quantize
from marlin_jax.models import Decoder, ModelConfig, fuse, unfuse
from marlin_jax.models.swiglu import QuantSwiGLU
from marlin_jax.quantized import QuantSpec

CONFIG = ModelConfig(
  architecture="Qwen2ForCausalLM",
  vocab_size=32,
  hidden_size=64,
  intermediate_size=64,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=32,
  max_position_embeddings=64,
  qkv_bias=True,
)

forward = nnx.jit(lambda model: model(jnp.arange(6)[None]))


@pytest.fixture
def model():
  model = Decoder(CONFIG, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  for layer in (model.layers[0].attention.q_proj, model.layers[0].attention.v_proj):
    layer.bias[...] = jnp.linspace(-1, 1, layer.bias.size)
  return model


@pytest.mark.parametrize("bits, sparse24", [(None, False), (4, False), (8, False), (4, True)])
def test_a_fused_model_computes_the_same(model, bits, sparse24):
  if bits:
    quantize(model, bits=bits, group_size=32, sparse24=sparse24, progress=False)
  expected = forward(model)
  assert fuse(fuse(model)) is model
  names = {path[-1] for path, child in nnx.iter_modules(model) if isinstance(child, nnx.Linear | QuantLinear)}
  assert names == {"qkv_proj", "o_proj", "swiglu" if bits else "gate_up_proj", "down_proj", "lm_head"}
  np.testing.assert_allclose(forward(model), expected, rtol=1e-5, atol=1e-5)


def test_layers_that_do_not_fit_together_stay_apart(model):
  attention, mlp = model.layers[0].attention, model.layers[0].mlp
  attention.k_proj = QuantLinear.from_linear(attention.k_proj, QuantSpec(group_size=32))
  mlp.gate_proj, mlp.up_proj = (
    QuantLinear.from_linear(layer, QuantSpec(group_size=size))
    for layer, size in ((mlp.gate_proj, 32), (mlp.up_proj, 64))
  )
  expected = forward(model)
  fuse(model)
  assert not hasattr(attention, "qkv_proj") and not hasattr(mlp, "gate_up_proj") and not hasattr(mlp, "swiglu")
  np.testing.assert_array_equal(forward(model), expected)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_unfuse_gives_the_same_layers(model, bits):
  if bits:
    quantize(model, bits=bits, group_size=32, progress=False)
  before = nnx.state(nnx.merge(*nnx.split(model)))
  assert unfuse(fuse(model)) is model and not hasattr(model.layers[0].attention, "qkv_proj")
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_weights_with_and_without_zero_points_stay_apart(model):
  mlp = model.layers[0].mlp
  mlp.gate_proj = QuantLinear.from_linear(mlp.gate_proj, QuantSpec(group_size=32))
  mlp.up_proj = QuantLinear.from_linear(mlp.up_proj, QuantSpec(group_size=32, symmetric=False))
  fuse(model)
  assert hasattr(mlp, "gate_proj") and not hasattr(mlp, "gate_up_proj") and not hasattr(mlp, "swiglu")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_width_that_blocks_of_eight_do_not_divide_is_fused_without_the_gate(bits):
  config = dataclasses.replace(CONFIG, intermediate_size=60)
  model = Decoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  quantize(model, bits=bits, group_size=None, progress=False)
  expected = forward(model)
  mlp = fuse(model).layers[0].mlp
  assert hasattr(mlp, "gate_up_proj") and not hasattr(mlp, "swiglu")
  np.testing.assert_allclose(forward(model), expected, rtol=1e-5, atol=1e-5)


def test_biases_of_gate_and_up_are_gated_with_them(model, rng):
  def layer(seed):
    linear = nnx.Linear(64, 48, param_dtype=jnp.float32, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(seed))
    return QuantLinear.from_linear(linear, QuantSpec(group_size=32))

  gate, up = layer(0), layer(1)
  x = jnp.asarray(rng.normal(size=(2, 3, 64)), jnp.float32)
  swiglu = QuantSwiGLU.of(gate, up)
  np.testing.assert_allclose(swiglu(x), jax.nn.silu(gate(x)) * up(x), rtol=1e-5, atol=1e-5)
  for part, again in zip((gate, up), swiglu.apart(), strict=True):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(part), nnx.state(again))
  up.bias = nnx.data(None)
  with pytest.raises(ValueError, match="must both have a bias or neither"):
    QuantSwiGLU.of(gate, up)
