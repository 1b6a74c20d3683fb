# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import pytest
from flax import nnx

from marlin_jax.models.config import ModelConfig
from marlin_jax.models.decoder import Decoder


@pytest.fixture(scope="session")
def model():
  """A random Llama with a context that is no power of two."""
  config = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_position_embeddings=100,
  )
  return Decoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(5))
