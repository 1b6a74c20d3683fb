# SPDX-License-Identifier: Apache-2.0
"""A model so small that benchmarks of it run on a CPU."""

from marlin_jax.models.config import ModelConfig

SMALL = ModelConfig(
  vocab_size=128,
  hidden_size=128,
  intermediate_size=128,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=64,
  max_position_embeddings=256,
)
