# SPDX-License-Identifier: Apache-2.0
"""What the tests of the attention kernels are made of: random heads, and the angles of positions."""

import jax.numpy as jnp

from marlin_jax.models.config import ModelConfig
from marlin_jax.models.layers import rope_table


def normal(rng, *shape, dtype=jnp.bfloat16):
  return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)


def angles(positions, head_dim):
  """(cos, sin), [B, T, head_dim / 2] each, of positions [B, T]."""
  config = ModelConfig(
    vocab_size=8,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=head_dim,
    max_position_embeddings=1024,
  )
  return rope_table(config, positions)
