# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk of a prompt over a key-value cache, Triton-lowered, in two kernels.

    write_kv           program (64 tokens or fewer, key head, row): rotates and stores their keys, stores their values
    prompt_attention   program (query head, as many tokens, row): rotates its queries, then takes what they see from the
                       cache, 64 keys at a time from its first position on

So the order in which a token's sums are made depends on its position and on nothing else: not on where its chunk
begins, not on the other rows. In one kernel each program would have to rotate again what the others of its chunk
write. That saves a launch of 2 us, and the angles, read again for each block of keys, made 230 us of 148 for 2048 new
tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention import BLOCK, Softmax, rotated, score_factor


def _load(ref, index, inside, lane, size):
  """Rows of a tile, zeros for those that are not inside."""
  mask = jnp.broadcast_to(inside[:, None], (*inside.shape, size))
  return plt.load(ref.at[*index, pl.ds(lane, size)], mask=mask, other=0.0)


def _store(ref, index, inside, lane, tile):
  plt.store(ref.at[*index, pl.ds(lane, tile.shape[1])], tile, mask=jnp.broadcast_to(inside[:, None], tile.shape))


def _load_rotated(qkv_ref, cos_ref, sin_ref, b, tokens, head, inside):
  """The rotated halves [tokens, D/2] of a head's queries or keys."""
  half = cos_ref.shape[2]
  pairs = (_load(qkv_ref, (b, tokens, head), inside, lane, half) for lane in (0, half))
  angles = (_load(ref, (b, tokens), inside, 0, half) for ref in (cos_ref, sin_ref))
  return rotated(*pairs, *angles, qkv_ref.dtype)


def _write_kernel(
  qkv_ref, row_ref, start_ref, cos_ref, sin_ref, _keys_ref, _values_ref, keys_ref, values_ref, *, block, length
):
  """keys[row, start + t] = rotated key of token t, and values likewise, where start + t < length."""
  kv_heads, head_dim = keys_ref.shape[2:]
  i, kv_head, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  begin, start = i * block, start_ref[b]
  token, tokens = begin + jnp.arange(block), pl.ds(begin, block)
  inside = token < qkv_ref.shape[1]
  key_head = qkv_ref.shape[2] - 2 * kv_heads + kv_head
  first, second = _load_rotated(qkv_ref, cos_ref, sin_ref, b, tokens, key_head, inside)
  value = _load(qkv_ref, (b, tokens, key_head + kv_heads), inside, 0, head_dim)
  place, inside = (row_ref[b], pl.ds(start + begin, block), kv_head), inside & (start + token < length)
  _store(keys_ref, place, inside, 0, first)
  _store(keys_ref, place, inside, head_dim // 2, second)
  _store(values_ref, place, inside, 0, value)


def _attend_kernel(
  qkv_ref, row_ref, start_ref, cos_ref, sin_ref, keys_ref, values_ref, out_ref, *, block, length, window
):
  """out[b, t, head] = softmax over the visible keys of q k^T / sqrt(D), times v."""
  _, tokens, heads, head_dim = out_ref.shape
  half, factor = head_dim // 2, score_factor(head_dim)
  # The last tokens see most: their programs begin first, so that none of them is alone at the end.
  head, b, begin = pl.program_id(0), pl.program_id(2), (math.ceil(tokens / block) - 1 - pl.program_id(1)) * block
  kv_head, row, start = lax.div(head, heads // keys_ref.shape[2]), row_ref[b], start_ref[b]
  token = begin + jnp.arange(block)
  inside = token < tokens
  q_first, q_second = _load_rotated(qkv_ref, cos_ref, sin_ref, b, pl.ds(begin, block), head, inside)
  position = start + token
  oldest = 0 if window is None else jnp.maximum(start + begin - window + 1, 0)
  stop = jnp.minimum(start + jnp.minimum(begin + block, tokens), length)  # behind the last key that one of them sees

  def add_block(i, softmax):
    at = i * BLOCK + jnp.arange(BLOCK)
    # What none of the tokens sees may be NaN, and zero times that is NaN.
    loaded = at < stop if window is None else (at >= oldest) & (at < stop)
    index = row, pl.ds(i * BLOCK, BLOCK), kv_head
    scores = plt.dot(q_first, _load(keys_ref, index, loaded, 0, half), trans_b=True)
    scores = (scores + plt.dot(q_second, _load(keys_ref, index, loaded, half, half), trans_b=True)) * factor
    visible = at[None, :] <= position[:, None]
    if window is not None:
      visible &= at[None, :] > position[:, None] - window
    return softmax.add(scores, visible, _load(values_ref, index, loaded, 0, head_dim))

  blocks = lax.div(oldest, BLOCK), lax.div(stop + BLOCK - 1, BLOCK)
  softmax = lax.fori_loop(*blocks, add_block, Softmax.empty(block, head_dim))
  # A token behind a length that is all behind its window sees nothing.
  out = softmax.acc / jnp.where(softmax.total > 0, softmax.total, 1.0)[:, None]
  _store(out_ref, (b, pl.ds(begin, block), head), inside, 0, out.astype(out_ref.dtype))


# A jit of its own: the layers of a model then share one trace and one lowering of the kernels.
@functools.partial(jax.jit, static_argnames=("length", "window", "interpret"))
def prompt_attention(
  qkv: Float[Array, "B T heads D"],
  keys: Float[Array, "rows S Hkv D"],
  values: Float[Array, "rows S Hkv D"],
  row: Int32[Array, " B"],
  start: Int32[Array, " B"],
  cos: Float32[Array, "B T pairs"],
  sin: Float32[Array, "B T pairs"],
  *,
  length: int,
  window: int | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, "B T queries D"], Float[Array, "rows S Hkv D"], Float[Array, "rows S Hkv D"]]:
  """softmax(q k^T / sqrt(D)) v for T new tokens of each sequence, and the cache with their keys and values written.

  Query head i attends to key head i // (H / Hkv). Scores, softmax and sums are float32; the numerator is rounded to
  the cache's dtype before it multiplies the values (FlashAttention, arXiv 2205.14135, algorithm 1).

  Args:
    qkv: the new tokens' H query heads, then their Hkv keys, then their Hkv values, before rotation.
    keys, values: the cache; updated in place where their buffers are donated.
    row: of the cache, which is each sequence's own.
    start: where the first new token stands. Token t sees the positions p of its row with
      start + t - window < p <= start + t.
    cos, sin: of the rotation angle of each pair (x[i], x[i + D/2]).
    length: positions of a row in use; a token at `length` or beyond is not written, and what it gets is finite.
    window: how many keys a token sees, itself included; None is all of them.
    interpret: run the kernels' bodies on the CPU, for tests.
  """
  batch, tokens, _, head_dim = qkv.shape
  kv_heads = keys.shape[2]
  heads = qkv.shape[2] - 2 * kv_heads
  # Two programs for 64 tokens, because there are few: 5.2 instead of 8.4 us, when it was one kernel. With 128 tokens a
  # program, 2048 take 125 us instead of 115, and 256 behind 1792 53 instead of 34.
  block = 64 if tokens > 64 else 32 if tokens > 16 else 16
  blocks = math.ceil(tokens / block)
  keys, values = pl.pallas_call(
    functools.partial(_write_kernel, block=block, length=length),
    out_shape=tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (keys, values)),
    grid=(blocks, kv_heads, batch),
    input_output_aliases={5: 0, 6: 1},
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="write_kv",
  )(qkv, row, start, cos, sin, keys, values)
  out = pl.pallas_call(
    functools.partial(_attend_kernel, block=block, length=length, window=window),
    out_shape=jax.ShapeDtypeStruct((batch, tokens, heads, head_dim), qkv.dtype),
    grid=(heads, blocks, batch),
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name="prompt_attention",
  )(qkv, row, start, cos, sin, keys, values)
  return out, keys, values
