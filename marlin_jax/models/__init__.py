# SPDX-License-Identifier: Apache-2.0
"""The Llama family in Flax NNX."""

from marlin_jax.models.config import Llama3Rope, ModelConfig, MoEConfig
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.fuse import fuse, unfuse
from marlin_jax.models.huggingface_config import config_from_hf, config_to_hf
from marlin_jax.models.kv_cache import KVCache

__all__ = [
  "Decoder",
  "KVCache",
  "Llama3Rope",
  "MoEConfig",
  "ModelConfig",
  "config_from_hf",
  "config_to_hf",
  "fuse",
  "unfuse",
]
