# SPDX-License-Identifier: Apache-2.0
"""The keys and values a decoder has seen, in buffers of fixed length: one compiled program serves every step."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from marlin_jax.models.config import ModelConfig

# An array, or what JAX has in its place where a program is lowered for shapes.
_Buffer = Array | jax.ShapeDtypeStruct | jax.stages.ArgInfo


class Row(NamedTuple):
  """The first `length` positions of one row of a buffer."""

  buffer: Float[Array, "rows S Hkv D"]
  index: Int[Array, ""]
  length: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
  """One `[batch, length, kv_heads, head_dim]` buffer of keys and one of values a layer.

  A buffer a layer, and not one stacked array: a step then updates each in place when the cache is donated.
  How far each row is filled is the caller's knowledge: it passes `start` to `Decoder.hidden`.
  """

  keys: tuple[Float[_Buffer, "B S Hkv D"] | Row, ...]
  values: tuple[Float[_Buffer, "B S Hkv D"] | Row, ...]

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

  def row(self, index: Int[Array, ""], length: int) -> "KVCache":
    """The first `length` positions of one row, as a cache of one row, which is read and written where it is."""
    return jax.tree.map(lambda buffer: Row(buffer, index, length), self)

  def whole(self) -> "KVCache":
    """The cache of which this is a `row`."""
    return jax.tree.map(lambda row: row.buffer, self, is_leaf=lambda leaf: isinstance(leaf, Row))

  def extended(self, length: int) -> "KVCache":
    """The same keys and values with room for `length` positions a row, at least as many as now; zeros in the new."""
    return jax.tree.map(lambda buffer: jnp.pad(buffer, ((0, 0), (0, length - self.length), (0, 0), (0, 0))), self)


def located(cached: Float[Array, "B S Hkv D"] | Row, batch: int) -> tuple[Array, Int[Array, " B"], int]:
  """The buffer that holds the keys or values of `batch` sequences, its row for each of them, and positions of a row."""
  if isinstance(cached, Row):
    return cached.buffer, cached.index[None], cached.length
  return cached, jnp.arange(batch), cached.shape[1]


def replaced(
  cached: Float[Array, "B S Hkv D"] | Row, buffer: Float[Array, "rows S Hkv D"]
) -> Float[Array, "B S Hkv D"] | Row:
  """The same place in another buffer."""
  return cached._replace(buffer=buffer) if isinstance(cached, Row) else buffer


def write(
  cached: Float[Array, "B S Hkv D"] | Row, new: Float[Array, "B T Hkv D"], start: Int[Array, " B"]
) -> Float[Array, "B S Hkv D"] | Row:
  """cached[b, start[b] + t] = new[b, t]; positions beyond it are dropped, never shifted back inside."""
  buffer, rows, length = located(cached, len(new))
  positions = start[:, None] + jnp.arange(new.shape[1])
  positions = jnp.where(positions < length, positions, positions + buffer.shape[1])  # beyond, each its own
  new = new.astype(buffer.dtype)
  return replaced(cached, buffer.at[rows[:, None], positions].set(new, mode="drop", unique_indices=True))


def read(buffer: Float[Array, "B S Hkv D"] | Row) -> Float[Array, "B S Hkv D"]:
  """The keys or values of all positions, or of those of a row."""
  if not isinstance(buffer, Row):
    return buffer
  whole, index, length = buffer
  return jax.lax.dynamic_slice(whole, (index, 0, 0, 0), (1, length, *whole.shape[2:]))
