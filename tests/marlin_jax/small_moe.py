# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts small enough for any test: the first of two layers has six experts, a token takes two."""

import jax.numpy as jnp
from flax import nnx

from marlin_jax.models import Decoder, ModelConfig, MoEConfig

SMALL_MOE = ModelConfig(
  architecture="Qwen3MoeForCausalLM",
  vocab_size=512,
  hidden_size=64,
  intermediate_size=96,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=32,
  max_position_embeddings=64,
  qk_norm=True,
  moe=MoEConfig(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    norm_topk_prob=True,
    layers=(0,),
  ),
)


def small_moe(dtype=jnp.float32) -> Decoder:
  return Decoder(SMALL_MOE, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
