# SPDX-License-Identifier: Apache-2.0
"""Residual and norm in the products: a model whose products leave norms to each other computes what it did."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax import ops, quantize
from marlin_jax.models import Decoder, KVCache, ModelConfig, fuse
from marlin_jax.models.residual import add_norm, onto
from marlin_jax.nnx import QuantLinear
from marlin_jax.quantized import QuantSpec
from pallas_kernels import DeferredNorm, matmul

CONFIG = ModelConfig(
  architecture="LlamaForCausalLM",
  vocab_size=96,
  hidden_size=64,
  intermediate_size=128,
  num_layers=3,
  num_heads=2,
  num_kv_heads=1,
  head_dim=32,
  max_position_embeddings=64,
)
TOKENS, START = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), jnp.zeros(2, jnp.int32)


@pytest.fixture(params=[True, False], ids=["fused", "apart"])
def model(request):
  model = Decoder(CONFIG, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  for path, norm in nnx.iter_modules(model):
    if isinstance(norm, nnx.RMSNorm):
      norm.scale[...] = jnp.linspace(0.5, 2, CONFIG.hidden_size) * (1 + len(path))
  quantize(model, group_size=32, progress=False)
  return fuse(model) if request.param else model


@pytest.fixture
def counts(monkeypatch):
  """Puts in the place of `matmul` one that leaves norms to the next product, as the Hopper kernel does, in plain jnp.

  Returns how many products left one and how many took one over.
  """
  counts = {"left": 0, "taken": 0}

  def deferring(x, *operands, norm=None, **options):
    counts["taken"] += isinstance(x, DeferredNorm)
    y = matmul(x, *operands, **options)
    if norm is None:
      return y
    counts["left"] += 1
    return y, DeferredNorm.of(y, *norm)

  for module in (ops, sys.modules["pallas_kernels.after_attention"]):
    monkeypatch.setattr(module, "matmul", deferring)
  return counts


def logits(model):
  return model(TOKENS), model.hidden(TOKENS, START, KVCache.empty(CONFIG, 2, 16, jnp.float32))[0]


def test_products_leave_norms_to_each_other_and_the_model_computes_the_same(model, request):
  expected = logits(model)
  counts = request.getfixturevalue("counts")
  found = logits(model)
  fused = hasattr(model.layers[0].attention, "qkv_proj")
  of_attention, of_mlp = (3, 3) if fused else (2 * 3, 3 * 2)  # products that read a norm that was left
  # Twice: both products of a layer that add to the residual leave one. The first layer's is made without a product, in
  # float32. The last one is read by the head, and after `fuse` by a projection that is there for nothing.
  assert counts == {"left": 2 * 2 * 3, "taken": 2 * (of_attention + of_mlp)}
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_the_first_layer_reads_a_deferred_norm_too(counts):
  model = fuse(quantize(Decoder(CONFIG, rngs=nnx.Rngs(0)), group_size=32, progress=False))
  assert jnp.isfinite(model(TOKENS)).all()
  assert counts == {"left": 2 * 3, "taken": 1 + 2 * 3}


@pytest.mark.parametrize("quantized", [False, True])
def test_a_layer_adds_to_the_residual_and_norms_it(quantized):
  layer = nnx.Linear(64, 64, rngs=nnx.Rngs(1))
  layer = QuantLinear.from_linear(layer, QuantSpec(group_size=32)) if quantized else layer
  norm = nnx.RMSNorm(64, rngs=nnx.Rngs(2))
  x, residual = (jax.random.normal(jax.random.key(i), (2, 3, 64)) for i in range(2))
  total, normed = onto(layer, x, residual, norm, fused=False)
  np.testing.assert_allclose(total, residual + layer(x), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(normed, norm(total), rtol=1e-5, atol=1e-5)
  alone, nothing = onto(layer, x, residual, None, fused=False)
  assert nothing is None
  np.testing.assert_array_equal(alone, total)
  assert add_norm(residual, x, None, fused=True)[1] is None
