# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk of a prompt over a key-value cache, Triton-lowered: rotates, writes the cache, attends.

    program (query head, 64 tokens, row)    its queries, rotated; then
      keys before the chunk                 from the cache, 64 at a time
      keys of the chunk, up to its own      from the projections, rotated again by each program that sees them: no
                                            program waits for another to have written them
      one of the heads of a key head        rotates and stores its tokens' keys and stores their values

A token's blocks of keys begin at the cache's first position and at the chunk's: what it gets depends on where the chunk
begins, and on nothing else.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention import BLOCK, Softmax, rotated

_TOKENS = 64  # of a program
_BEYOND = 1 << 30  # where a key stands that is not in the cache yet: behind every token


def _kernel(
  qkv_ref,
  row_ref,
  start_ref,
  cos_ref,
  sin_ref,
  _keys_ref,
  _values_ref,
  out_ref,
  keys_ref,
  values_ref,
  *,
  block,
  length,
  window,
):
  """out[b, t, head] = softmax over the visible keys of q k^T / sqrt(D), times v."""
  _, tokens, heads, head_dim = out_ref.shape
  kv_heads, half, dtype = keys_ref.shape[2], head_dim // 2, keys_ref.dtype
  group, blocks = heads // kv_heads, math.ceil(tokens / block)
  of_chunk = min(block, BLOCK)  # new keys that are taken at a time
  # The last tokens see most: their programs begin first, so that none of them is alone at the end.
  head, b, begin = pl.program_id(0), pl.program_id(2), (blocks - 1 - pl.program_id(1)) * block
  kv_head, row, start = lax.div(head, group), row_ref[b], start_ref[b]
  token = begin + jnp.arange(block)
  scale = head_dim**-0.5

  def load(ref, inside, index, lane, size):
    mask = jnp.broadcast_to(inside[:, None], (*inside.shape, size))
    return plt.load(ref.at[*index, pl.ds(lane, size)], mask=mask, other=0.0)

  def load_projected(first, size, index, lane, width):
    tokens_of_it = pl.ds(first, size)
    return load(qkv_ref, first + jnp.arange(size) < tokens, (b, tokens_of_it, index), lane, width)

  def load_rotated(first, size, index):
    inside = first + jnp.arange(size) < tokens
    pairs = (load_projected(first, size, index, lane, half) for lane in (0, half))
    angles = (load(ref, inside, (b, pl.ds(first, size)), 0, half) for ref in (cos_ref, sin_ref))
    return rotated(*pairs, *angles, dtype)

  q_first, q_second = load_rotated(begin, block, head)

  @pl.when(head == kv_head * group)
  def _():
    inside = (token < tokens) & (start + token < length)
    at = (row, pl.ds(start + begin, block), kv_head)

    def store(ref, lane, array):
      mask = jnp.broadcast_to(inside[:, None], array.shape)
      plt.store(ref.at[*at, pl.ds(lane, array.shape[1])], array, mask=mask)

    k_first, k_second = load_rotated(begin, block, heads + kv_head)
    store(keys_ref, 0, k_first)
    store(keys_ref, half, k_second)
    store(values_ref, 0, load_projected(begin, block, heads + kv_heads + kv_head, 0, head_dim))

  def add(softmax, k_first, k_second, values, distance):
    scores = (plt.dot(q_first, k_first, trans_b=True) + plt.dot(q_second, k_second, trans_b=True)) * scale
    visible = distance >= 0
    if window is not None:
      visible &= distance < window
    return softmax.add(scores, visible, values)

  def add_cached(i, softmax):
    at = i * BLOCK + jnp.arange(BLOCK)
    # No program loads what none of its tokens sees: it may be NaN, and zero times that is NaN.
    inside = at < start if window is None else (at < start) & (at > start + begin - window)
    index = (row, pl.ds(i * BLOCK, BLOCK), kv_head)
    halves = (load(keys_ref, inside, index, lane, half) for lane in (0, half))
    values = load(values_ref, inside, index, 0, head_dim)
    distance = start + token[:, None] - jnp.where(at < start, at, _BEYOND)[None, :]
    return add(softmax, *halves, values, distance)

  def add_new(i, softmax):
    first = i * of_chunk
    values = load_projected(first, of_chunk, heads + kv_heads + kv_head, 0, head_dim)
    distance = token[:, None] - (first + jnp.arange(of_chunk))[None, :]
    return add(softmax, *load_rotated(first, of_chunk, heads + kv_head), values, distance)

  cached, new = 0, 0  # the first block that a token of the program sees
  if window is not None:
    cached = lax.div(jnp.maximum(start + begin - window + 1, 0), BLOCK)
    new = lax.div(jnp.maximum(begin - window + 1, 0), of_chunk)
  softmax = Softmax.empty(block, head_dim)
  softmax = lax.fori_loop(cached, lax.div(start + BLOCK - 1, BLOCK), add_cached, softmax)
  softmax = lax.fori_loop(new, lax.div(begin + block + of_chunk - 1, of_chunk), add_new, softmax)
  out = (softmax.acc / softmax.total[:, None]).astype(out_ref.dtype)
  mask = jnp.broadcast_to((token < tokens)[:, None], out.shape)
  plt.store(out_ref.at[b, pl.ds(begin, block), head, :], out, mask=mask)


# A jit of its own: the layers of a model then share one trace and one lowering of the kernel.
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
    length: positions of a row in use; a token at `length` or beyond is not written.
    window: how many keys a token sees, itself included; None is all of them.
    interpret: run the kernel's body on the CPU, for tests.
  """
  batch, tokens, _, head_dim = qkv.shape
  heads = qkv.shape[2] - 2 * keys.shape[2]
  block = max(16, min(_TOKENS, 1 << (tokens - 1).bit_length()))
  shape = jax.ShapeDtypeStruct
  return pl.pallas_call(
    functools.partial(_kernel, block=block, length=length, window=window),
    out_shape=(
      shape((batch, tokens, heads, head_dim), qkv.dtype),
      *(shape(array.shape, array.dtype) for array in (keys, values)),
    ),
    grid=(heads, math.ceil(tokens / block), batch),
    input_output_aliases={5: 1, 6: 2},
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name="prompt_attention",
  )(qkv, row, start, cos, sin, keys, values)
