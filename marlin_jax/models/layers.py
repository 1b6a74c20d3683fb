# SPDX-License-Identifier: Apache-2.0
"""The parts of a Llama-family decoder: rotary position embedding, grouped-query attention, gated MLP."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from marlin_jax.models.config import ModelConfig
from marlin_jax.models.kv_cache import write


def rope_frequencies(config: ModelConfig) -> Float32[np.ndarray, " pairs"]:
  """f[i] = theta ** (-2 i / D), in radians a position, with the llama3 scaling where the config has it.

  RoFormer, section 3.2.2 (arXiv 2104.09864). The llama3 scaling is that of the Llama 3.1 release: a wavelength below
  original / high_freq_factor is kept, one above original / low_freq_factor is stretched by `factor`, and between the
  two the frequency is interpolated.
  """
  pairs = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
  frequencies = np.float32(1) / np.float32(config.rope_theta) ** pairs
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  turns = scaling.original_max_position_embeddings * frequencies / np.float32(2 * np.pi)
  kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  kept = np.clip(kept, 0, 1).astype(np.float32)
  return kept * frequencies + (1 - kept) * frequencies / np.float32(scaling.factor)


def rotate(
  x: Float[Array, "B T H D"], positions: Int[Array, "B T"], frequencies: Float32[np.ndarray, " pairs"]
) -> Float[Array, "B T H D"]:
  """Turn the pair (x[i], x[i + D/2]) by the angle position * f[i]; the pairing of the Hugging Face checkpoints."""
  angle = positions[..., None, None] * frequencies
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
  queries: Float[Array, "B T H D"],
  keys: Float[Array, "B S Hkv D"],
  values: Float[Array, "B S Hkv D"],
  positions: Int[Array, "B T"],
  window: int | None,
) -> Float[Array, "B T H*D"]:
  """softmax(q k^T / sqrt(D)) v over the keys at positions p with position - window < p <= position.

  Key s stands at position s. Scores and softmax are float32. A key head serves H / Hkv query heads by an axis of its
  own in the product, so keys and values are read once and never repeated in memory.
  """
  batch, length, heads, head_dim = queries.shape
  kv_heads = keys.shape[2]
  grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
  scores = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
  distance = positions[:, :, None] - jnp.arange(keys.shape[1])
  visible = distance >= 0
  if window is not None:
    visible &= distance < window
  # A finite bias: a row that sees nothing (a padding token beyond the cache) stays finite instead of turning to NaN.
  scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  return jnp.einsum("bkgts,bskd->btkgd", weights, values).reshape(batch, length, heads * head_dim)


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions, and a norm of each query and key head where the config has it."""

  def __init__(self, config: ModelConfig, window: int | None, *, dtype, param_dtype, rngs: nnx.Rngs):
    dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    q_features, kv_features = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    self.q_proj = nnx.Linear(config.hidden_size, q_features, use_bias=config.qkv_bias, **dtypes)
    self.k_proj = nnx.Linear(config.hidden_size, kv_features, use_bias=config.qkv_bias, **dtypes)
    self.v_proj = nnx.Linear(config.hidden_size, kv_features, use_bias=config.qkv_bias, **dtypes)
    self.o_proj = nnx.Linear(q_features, config.hidden_size, use_bias=config.output_bias, **dtypes)
    if config.qk_norm:
      self.q_norm = nnx.RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, **dtypes)
      self.k_norm = nnx.RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, **dtypes)
    self.config = config
    self.window = window

  def __call__(
    self, x: Float[Array, "B T E"], positions: Int[Array, "B T"], cached: tuple[Array, Array] | None
  ) -> tuple[Float[Array, "B T E"], tuple[Array, Array]]:
    """Attend among the tokens of x (cached is None), or write their keys and values into `cached` and attend to it.

    Without a cache the tokens of x stand at positions 0 .. T-1. Returns the output and the keys and values attended to.
    """
    config = self.config
    queries = self.q_proj(x).reshape(*x.shape[:2], config.num_heads, config.head_dim)
    keys = self.k_proj(x).reshape(*x.shape[:2], config.num_kv_heads, config.head_dim)
    values = self.v_proj(x).reshape(*x.shape[:2], config.num_kv_heads, config.head_dim)
    if config.qk_norm:
      queries, keys = self.q_norm(queries), self.k_norm(keys)
    frequencies = rope_frequencies(config)
    queries, keys = rotate(queries, positions, frequencies), rotate(keys, positions, frequencies)
    if cached is not None:
      start = positions[:, 0]
      keys, values = write(cached[0], keys, start), write(cached[1], values, start)
    return self.o_proj(attend(queries, keys, values, positions, self.window)), (keys, values)


class MLP(nnx.Module):
  """down(silu(gate(x)) * up(x)): SwiGLU, "GLU Variants Improve Transformer", section 2 (arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    options = {"use_bias": config.mlp_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.gate_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **options)
    self.up_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **options)
    self.down_proj = nnx.Linear(config.intermediate_size, config.hidden_size, **options)

  def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: ModelConfig, window: int | None, *, dtype, param_dtype, rngs: nnx.Rngs):
    dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.input_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **dtypes)
    self.attention = Attention(config, window, **dtypes)
    self.post_attention_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **dtypes)
    self.mlp = MLP(config, **dtypes)

  def __call__(
    self, x: Float[Array, "B T E"], positions: Int[Array, "B T"], cached: tuple[Array, Array] | None
  ) -> tuple[Float[Array, "B T E"], tuple[Array, Array]]:
    attended, cached = self.attention(self.input_norm(x), positions, cached)
    x = x + attended
    return x + self.mlp(self.post_attention_norm(x)), cached
