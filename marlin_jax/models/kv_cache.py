# SPDX-License-Identifier: Apache-2.0
"""The keys and values a decoder has seen, in buffers of fixed length: one compiled program serves every step."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from marlin_jax.models.config import ModelConfig

# An array, or what JAX has in its place where a program is lowered for shapes.
_Buffer = Array | jax.ShapeDtypeStruct | jax.stages.ArgInfo


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
  """One `[batch, length, kv_heads, head_dim]` buffer of keys and one of values a layer.

  A buffer a layer, and not one stacked array: a step then updates each in place when the cache is donated.
  How far each row is filled is the caller's knowledge: it passes `start` to `Decoder.hidden`.
  """

  keys: tuple[Float[_Buffer, "B S Hkv D"], ...]
  values: tuple[Float[_Buffer, "B S Hkv D"], ...]

  @classmethod
  def empty(cls, config: ModelConfig, batch: int, length: int, dtype=jnp.bfloat16) -> "KVCache":
    """A cache of zeros for `batch` rows of up to `length` tokens each."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    return cls(
      keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
      values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
    )

  @property
  def length(self) -> int:
    """How many positions each row has room for."""
    return self.keys[0].shape[1]

  def head(self, row: Int[Array, ""], length: int) -> "KVCache":
    """The first `length` positions of one row, as a cache of one row: what a prompt that ends there can see."""
    return jax.tree.map(
      lambda buffer: jax.lax.dynamic_slice(buffer, (row, 0, 0, 0), (1, length, *buffer.shape[2:])), self
    )

  def extended(self, length: int) -> "KVCache":
    """The same keys and values with room for `length` positions a row, at least as many as now; zeros in the new."""
    return jax.tree.map(lambda buffer: jnp.pad(buffer, ((0, 0), (0, length - self.length), (0, 0), (0, 0))), self)


def write(
  buffer: Float[Array, "B S Hkv D"], new: Float[Array, "B T Hkv D"], start: Int[Array, " B"]
) -> Float[Array, "B S Hkv D"]:
  """buffer[b, start[b] + t] = new[b, t]; positions beyond the buffer are dropped, never shifted back inside."""
  rows = jnp.arange(new.shape[0])[:, None]
  positions = start[:, None] + jnp.arange(new.shape[1])
  return buffer.at[rows, positions].set(new.astype(buffer.dtype), mode="drop", unique_indices=True)
