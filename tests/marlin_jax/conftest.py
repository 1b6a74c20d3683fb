# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from marlin_jax.checkpoint import save_model
from marlin_jax.models import Decoder, ModelConfig
from marlin_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
  """A folder with a random float Llama and a tokenizer.

  Its dense layers but the head are of one shape, so that each method of quantization is compiled once for all of them.
  """
  config = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=256,
  )
  model = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  model.tokenizer = Tokenizer.from_folder(Path(__file__).parents[1] / "data" / "llama-bf16")
  folder = tmp_path_factory.mktemp("small") / "checkpoint"
  save_model(model, folder)
  return folder
