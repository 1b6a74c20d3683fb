# SPDX-License-Identifier: Apache-2.0
"""The parts of a Llama-family decoder: rotary position embedding, grouped-query attention, the decoder layer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from marlin_jax.models.config import ModelConfig
from marlin_jax.models.kv_cache import View, located, replaced, write
from marlin_jax.models.kv_cache import read as read_cache
from marlin_jax.models.mlp import MLP, MoE
from marlin_jax.models.residual import after_attention, between_attentions, onto, read
from marlin_jax.nnx import QuantLinear
from pallas_kernels import DeferredNorm, layout
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prompt_attention import prompt_attention

Projected = tuple[Float[Array, "B T _"], ...]  # queries, keys and values; one array after `fuse`
Cached = tuple[Array | View, ...]  # keys and values of a layer, and after them what its attention counts in
Rope = tuple[Float32[Array, "B T pairs"], Float32[Array, "B T pairs"]]  # cosine and sine of every pair's angle


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


def rope_table(config: ModelConfig, positions: Int[Array, "B T"]) -> Rope:
  """(cos, sin) of the angle position * f[i] of every pair: the same for all layers, so computed once."""
  angle = positions[..., None] * rope_frequencies(config)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T H D"], rope: Rope) -> Float[Array, "B T H D"]:
  """Turn the pair (x[i], x[i + D/2]) by its angle; the pairing of the Hugging Face checkpoints."""
  cos, sin = (table[:, :, None] for table in rope)
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
  # What an earlier request left in the cache may be NaN or Inf, and zero times that is NaN.
  values = jnp.where(visible.any(axis=1)[:, :, None, None], values, 0)
  return jnp.einsum("bkgts,bskd->btkgd", weights, values).reshape(batch, length, heads * head_dim)


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions, and a norm of each query and key head where the config has it.

  The three projections of x are one, `qkv_proj`, after `fuse`.
  """

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
    self,
    projected: Projected,
    positions: Int[Array, "B T"],
    rope: Rope,
    cached: Cached | None,
    *,
    fused: bool = False,
  ) -> tuple[Float[Array, "B T HD"], Cached]:
    """Attend among the tokens (cached is None), or write their keys and values into `cached` and attend to it.

    Without a cache the tokens stand at positions 0 .. T-1. Returns what `o_proj` is to read, and the keys and
    values attended to. `fused` takes the kernels, which need a cache; that for one token a row needs beside keys and
    values in `cached` the zeros in which its programs count themselves.
    """
    queries, keys, values = self._heads(projected)
    if fused:
      assert cached is not None
      qkv = jnp.concatenate([queries, keys, values], axis=2)
      attended, cached = self._attend_by_kernel(qkv, positions[:, 0], rope, cached)
      attended = attended.reshape(*positions.shape, -1)
    else:
      queries, keys = rotate(queries, rope), rotate(keys, rope)
      if cached is not None:
        start = positions[:, 0]
        keys, values = write(cached[0], keys, start), write(cached[1], values, start)
      attended = attend(queries, read_cache(keys), read_cache(values), positions, self.window)
      cached = keys, values
    return attended, cached

  def project(self, x: Float[Array, "B T E"] | DeferredNorm) -> Projected:
    """The queries, keys and values of x, of all heads."""
    projections = (self.qkv_proj,) if hasattr(self, "qkv_proj") else (self.q_proj, self.k_proj, self.v_proj)
    return tuple(read(project, x) for project in projections)

  def _attend_by_kernel(
    self, qkv: Float[Array, "B T heads D"], start: Int[Array, " B"], rope: Rope, cached: Cached
  ) -> tuple[Array, Cached]:
    cos, sin = rope
    if qkv.shape[1] == 1:
      attended, *cached = decode_attention(qkv[:, 0], *cached, start, cos[:, 0], sin[:, 0], window=self.window)
      return attended, tuple(cached)
    (keys, row, length), (values, *_) = (located(one, len(qkv)) for one in cached)
    where = {"length": length, "window": self.window}
    attended, *buffers = prompt_attention(qkv, keys, values, row, start, cos, sin, **where)
    return attended, tuple(map(replaced, cached, buffers))

  def _heads(self, projected: Projected) -> tuple[Array, Array, Array]:
    """Queries, keys and values, [B, T, heads, D], normed but not rotated."""
    config = self.config
    heads = [array.reshape(*array.shape[:2], -1, config.head_dim) for array in projected]
    if len(heads) == 1:
      heads = jnp.split(heads[0], [config.num_heads, config.num_heads + config.num_kv_heads], axis=2)
    queries, keys, values = heads
    if config.qk_norm:
      queries, keys = self.q_norm(queries), self.k_norm(keys)
    return queries, keys, values


class DecoderLayer(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), where the MLP may be a mixture of experts."""

  def __init__(self, config: ModelConfig, index: int, *, dtype, param_dtype, rngs: nnx.Rngs):
    dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.input_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **dtypes)
    self.attention = Attention(config, config.sliding_windows[index], **dtypes)
    self.post_attention_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **dtypes)
    if config.moe is not None and index in config.moe.layers:
      self.mlp = MoE(config, config.moe, **dtypes)
    else:
      self.mlp = MLP(config, config.intermediate_size, **dtypes)

  def project(self, x: Float[Array, "B T E"]) -> Projected:
    """What the attention projects of input_norm(x), of an x that no layer before has projected.

    The norm is left to the projection in the form in which a product would have left it, so that the first layer's
    products are those of all others, and not compiled apart.
    """
    norm, reader = self.input_norm, getattr(self.attention, "qkv_proj", None)
    if isinstance(reader, QuantLinear) and x.dtype == jnp.bfloat16 and x.shape[-1] % layout.TILE == 0:
      return self.attention.project(DeferredNorm.of(x, norm.scale[...], norm.epsilon))
    return self.attention.project(norm(x))

  def __call__(
    self,
    x: Float[Array, "B T E"],
    projected: Projected,
    positions: Int[Array, "B T"],
    rope: Rope,
    cached: Cached | None,
    norm: nnx.RMSNorm | None = None,
    following: "DecoderLayer | None" = None,
    *,
    fused: bool = False,
  ) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"] | DeferredNorm | None, Projected | None, Cached]:
    """(x, norm(x), projected, cached) after this layer, of x and what its attention projected of it.

    Args:
      norm: that of what comes after.
      following: the layer that comes after, whose attention projects norm(x).
      fused: takes kernels for what is between the products; see `Attention`.
    """
    attended, cached = self.attention(projected, positions, rope, cached, fused=fused)
    # What the last layer projects nobody reads: that way its kernel is the one of all others, and not compiled apart.
    reader = getattr((following or self).attention, "qkv_proj", None)
    layers = self.attention.o_proj, getattr(self.mlp, "swiglu", None), getattr(self.mlp, "down_proj", None), reader
    if norm is not None and between_attentions(layers, x.dtype):
      x, normed, y = after_attention(layers, attended, x, (self.post_attention_norm, norm))
      return x, normed, (y,), cached
    x, normed = onto(self.attention.o_proj, attended, x, self.post_attention_norm, fused=fused)
    x, normed = self.mlp.onto(x, normed, norm, fused=fused)
    return x, normed, None if following is None else following.attention.project(normed), cached
