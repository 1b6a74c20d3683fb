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


class View(NamedTuple):
  """The first `length` positions of a buffer's rows: of one, or of all of them where `row` is None."""

  buffer: Float[Array, "rows S Hkv D"]
  row: Int[Array, ""] | None
  length: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
  """One `[batch, length, kv_heads, head_dim]` buffer of keys and one of values a layer.

  A buffer a layer, and not one stacked array: a step then updates each in place when the cache is donated.
  How far each row is filled is the caller's knowledge: it passes `start` to `Decoder.hidden`.
  """

  keys: tuple[Float[_Buffer, "B S Hkv D"] | View, ...]
  values: tuple[Float[_Buffer, "B S Hkv D"] | View, ...]

  @classmethod
  def empty(cls, config: ModelConfig, batch: int, length: int, dtype=jnp.bfloat16) -> "KVCache":
    """A cache of zeros for `batch` rows of up to `length` tokens each."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    return cls(
      keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
      values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
    )

  def view(self, length: int, row: Int[Array, ""] | None = None) -> "KVCache":
    """The first `length` positions of all rows or of one, as a cache of its own, which is read and written where it is.

    Attention costs every position of a cache that it is given, seen or not, where it has no kernel.
    """
    return jax.tree.map(lambda buffer: View(buffer, row, length), self)

  def whole(self) -> "KVCache":
    """The cache of which this is a `view`."""
    return jax.tree.map(lambda view: view.buffer, self, is_leaf=lambda leaf: isinstance(leaf, View))


def located(cached: Float[Array, "B S Hkv D"] | View, batch: int) -> tuple[Array, Int[Array, " B"], int]:
  """The buffer that holds the keys or values of `batch` sequences, its row for each of them, and positions of a row."""
  if not isinstance(cached, View):
    return cached, jnp.arange(batch), cached.shape[1]
  return cached.buffer, jnp.arange(batch) if cached.row is None else cached.row[None], cached.length


def replaced(
  cached: Float[Array, "B S Hkv D"] | View, buffer: Float[Array, "rows S Hkv D"]
) -> Float[Array, "B S Hkv D"] | View:
  """The same place in another buffer."""
  return cached._replace(buffer=buffer) if isinstance(cached, View) else buffer


def write(
  cached: Float[Array, "B S Hkv D"] | View, new: Float[Array, "B T Hkv D"], start: Int[Array, " B"]
) -> Float[Array, "B S Hkv D"] | View:
  """cached[b, start[b] + t] = new[b, t]; positions beyond it are dropped, never shifted back inside."""
  buffer, rows, length = located(cached, len(new))
  positions = start[:, None] + jnp.arange(new.shape[1])
  positions = jnp.where(positions < length, positions, positions + buffer.shape[1])  # beyond, each its own
  new = new.astype(buffer.dtype)
  return replaced(cached, buffer.at[rows[:, None], positions].set(new, mode="drop", unique_indices=True))


def read(cached: Float[Array, "B S Hkv D"] | View) -> Float[Array, "B S Hkv D"]:
  """The keys or values of all positions."""
  if not isinstance(cached, View):
    return cached
  buffer, row, length = cached
  if row is None:
    return buffer[:, :length]
  return jax.lax.dynamic_slice(buffer, (row, 0, 0, 0), (1, length, *buffer.shape[2:]))
