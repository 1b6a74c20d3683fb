# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax import QuantLinear, quantize
from marlin_jax.models import Decoder, ModelConfig, fuse, unfuse
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
  assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}
  assert isinstance(model.layers[0].mlp.gate_up_proj, QuantLinear if bits else nnx.Linear)
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
  assert not hasattr(attention, "qkv_proj") and not hasattr(mlp, "gate_up_proj")
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
  assert not hasattr(fuse(model).layers[0].mlp, "gate_up_proj")
