# SPDX-License-Identifier: Apache-2.0
"""One decoder for Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE; what differs between them is in the ModelConfig."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from marlin_jax.models.config import ModelConfig
from marlin_jax.models.kv_cache import KVCache
from marlin_jax.models.layers import DecoderLayer, rope_table
from pallas_kernels import current_device, resolved
from pallas_kernels.attention import unsupported_reason


class Decoder(nnx.Module):
  """Token ids in, float32 logits out.

  Every dense layer is an `nnx.Linear` and is only ever called, so that `quantize` can put a QuantLinear in its place;
  those of experts are stacks, `models/mlp.py`.
  `dtype` is what the layers compute in; norms, softmax and the logits are float32 whatever it is.
  """

  def __init__(self, config: ModelConfig, *, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs: nnx.Rngs):
    dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.config = config
    self.dtype = jnp.dtype(dtype)
    # What turns text into token ids for this model, when it came with one; set by load_model.
    self.tokenizer: Any = None
    self.embed = nnx.Embed(config.vocab_size, config.hidden_size, **dtypes)
    self.layers = nnx.List([DecoderLayer(config, index, **dtypes) for index in range(config.num_layers)])
    self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **dtypes)
    if not config.tie_word_embeddings:
      # float32 out of the product: bf16 logits near 20 lie 0.125 apart, which ties the best with its neighbours.
      self.lm_head = nnx.Linear(
        config.hidden_size, config.vocab_size, use_bias=False, preferred_element_type=jnp.float32, **dtypes
      )

  def __call__(self, tokens: Int[Array, "B T"]) -> Float32[Array, "B T V"]:
    """Logits at every position of a full causal forward pass; no cache, differentiable."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rope = rope_table(self.config, positions)
    x = self.embed(tokens)
    projected = self.layers[0].project(x)
    for layer, after in zip(self.layers, self._after(), strict=True):
      x, normed, projected, _ = layer(x, projected, positions, rope, None, *after)
    return self.logits(resolved(normed))

  def hidden(
    self, tokens: Int[Array, "B T"], start: Int[Array, " B"], cache: KVCache
  ) -> tuple[Float[Array, "B T E"], KVCache]:
    """The normalized last hidden state of T tokens of each row, and the cache with their keys and values written.

    Token t of row b stands at position start[b] + t, is written there, and sees the cache at positions up to its own.
    Whatever lies in the cache beyond that is never read, so a row may be padded on the right. A token beyond the cache
    is not written and its hidden state is meaningless, but finite.
    """
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    rope = rope_table(self.config, positions)
    fused = not unsupported_reason(self.dtype, self.config.head_dim, current_device())
    x = self.embed(tokens)
    projected = self.layers[0].project(x)
    keys, values = [], []
    # In which the programs of a decode step's attention count themselves; every layer gives it back as it was.
    counted = fused and tokens.shape[1] == 1
    arrivals = [jnp.zeros((len(tokens), self.config.num_kv_heads), jnp.int32)] if counted else []
    for layer, after, *cached in zip(self.layers, self._after(), cache.keys, cache.values, strict=True):
      x, normed, projected, (layer_keys, layer_values, *arrivals) = layer(
        x, projected, positions, rope, (*cached, *arrivals), *after, fused=fused
      )
      keys.append(layer_keys)
      values.append(layer_values)
    return resolved(normed), KVCache(keys=tuple(keys), values=tuple(values))

  def _after(self) -> list[tuple[nnx.RMSNorm, DecoderLayer | None]]:
    """The norm of what each layer returns, and the layer that reads it: the next one, and the model's norm and none."""
    return [(layer.input_norm, layer) for layer in self.layers[1:]] + [(self.norm, None)]

  def logits(self, hidden: Float[Array, "... E"]) -> Float32[Array, "... V"]:
    """The head alone: the scores of the vocabulary for hidden states that `hidden` returned."""
    if self.config.tie_word_embeddings:
      embedding = self.embed.embedding[...].astype(self.dtype)
      return jnp.einsum("...e,ve->...v", hidden, embedding, preferred_element_type=jnp.float32)
    return self.lm_head(hidden).astype(jnp.float32)
