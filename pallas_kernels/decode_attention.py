# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token a row over a key-value cache, Triton-lowered: rotates, writes the cache, attends.

    attend    a softmax of its own over each chunk of 256 positions, merged in the order of the positions. One program
              takes a row and key head with all chunks where that alone fills the GPU and chunks are few, else with one.
              The program that has the new token's chunk also rotates and stores the new key and stores the new value.
    combine   where the programs had a chunk each: merges the chunks of a row, in the same order.

Chunks and blocks lie at the same positions whatever the batch and the length of the cache, only those that hold keys
that the row sees are read, and both ways compute a chunk and merge it by the same code: what a row gets depends on
nothing but the row.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.hardware import Device

_CHUNK = 256
_BLOCK = 64
# So many programs fill a GPU (an H200 has 132 multiprocessors; 16 rows of 8 key heads are these): more of them, with a
# chunk each, would only start, find nothing where the row is short, and cost the second kernel.
_FILLING_PROGRAMS = 128
# A program is alone with the keys of its row, and the longest row keeps all others waiting: with 2048 positions in use
# by every row it takes 40 us, as many as chunks apart.
_MOST_CHUNKS = 8
_NOTHING = -1e30  # the maximum over no scores: finite, so that no difference of two of them is NaN


def unsupported_reason(dtype, head_dim: int, device: Device) -> str | None:
  """Why the kernel cannot attend over a cache of `dtype` on `device`; None if it can."""
  if device.platform != "cuda":
    return f"it runs on NVIDIA GPUs, not on {device.platform}"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"the cache must be bfloat16 or float16, not {dtype}"
  if head_dim not in (32, 64, 128, 256):
    return f"head_dim={head_dim} must be 32, 64, 128 or 256"
  return None


def _rotate(first, second, cos, sin, dtype):
  first, second = first.astype(jnp.float32), second.astype(jnp.float32)
  return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)


def _visible_chunks(position, length, window):
  """(first, last) chunk that holds a key which the row sees; `last` is the new token's, also beyond the cache."""
  if length <= _CHUNK:
    return 0, 0  # static: the compiler sees how few blocks there are, and of 128 positions loads none within the loop
  last = jnp.minimum(lax.div(position, _CHUNK), math.ceil(length / _CHUNK) - 1)
  first = 0 if window is None else lax.div(jnp.maximum(position - window + 1, 0), _CHUNK)
  return jnp.minimum(first, last), last


def _no_chunks(rows, head_dim):
  """(maximum, sum, numerator) of the softmax over no keys; merged with a chunk it is that chunk, bit for bit."""
  return jnp.full(rows, _NOTHING, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((rows, head_dim), jnp.float32)


def _merge(softmax, chunk):
  """(maximum, sum, numerator) of the softmax over the keys of both."""
  (top, total, acc), (chunk_top, chunk_total, chunk_acc) = softmax, chunk
  higher = jnp.maximum(top, chunk_top)
  shrink, weight = jnp.exp(top - higher), jnp.exp(chunk_top - higher)
  return higher, total * shrink + chunk_total * weight, acc * shrink[:, None] + chunk_acc * weight[:, None]


def _attend_kernel(
  qkv_ref,
  position_ref,
  cos_ref,
  sin_ref,
  keys_ref,
  values_ref,
  out_ref,
  max_ref,
  sum_ref,
  new_keys_ref,
  new_values_ref,
  *,
  heads,
  window,
):
  """All chunks of one row, or one of them: softmax numerator, its maximum and its sum over the visible keys.

  The inner loop takes the keys that are in the cache already; the new one is the first term of its chunk, from
  registers. A program whose chunk the row does not see leaves at once.
  """
  _, length, kv_heads, head_dim = keys_ref.shape
  parts, half, group, dtype = out_ref.shape[1], head_dim // 2, heads // kv_heads, keys_ref.dtype
  rows = max(16, 1 << (group - 1).bit_length())  # a matrix instruction has 16 rows; those beyond the group are zero
  b, h, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  position = position_ref[b]
  first, last = _visible_chunks(position, length, window)
  # A part of several is one chunk; the only part is all of them.
  begin, end = (first, last + 1) if parts == 1 else (jnp.maximum(first, part), jnp.minimum(last, part) + 1)

  @pl.when(begin < end)
  def _():
    cos, sin = cos_ref[b, :], sin_ref[b, :]
    in_group = jnp.arange(rows) < group
    mask = jnp.broadcast_to(in_group[:, None], (rows, half))

    def load_queries(lane):
      return plt.load(qkv_ref.at[b, pl.ds(h * group, rows), pl.ds(lane, half)], mask=mask, other=0.0)

    q_first, q_second = _rotate(load_queries(0), load_queries(half), cos[None, :], sin[None, :], dtype)
    halves = (qkv_ref[b, heads + h, pl.ds(lane, half)] for lane in (0, half))
    k_first, k_second = _rotate(*halves, cos, sin, dtype)
    value = qkv_ref[b, heads + kv_heads + h, :]

    @pl.when((end > last) & (position < length))
    def _():
      new_keys_ref[b, position, h, pl.ds(0, half)] = k_first
      new_keys_ref[b, position, h, pl.ds(half, half)] = k_second
      new_values_ref[b, position, h, :] = value

    scale = head_dim**-0.5

    def product(q, k):
      return jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[None, :], axis=1)

    score = (product(q_first, k_first) + product(q_second, k_second)) * scale

    def merge_chunk(chunk, softmax):
      owner = chunk == last
      start = chunk * _CHUNK
      stop = jnp.minimum(jnp.minimum(start + _CHUNK, position), length)
      if window is not None:
        start = jnp.maximum(start, position - window + 1)
      top = jnp.where(owner, score, _NOTHING)
      total = jnp.where(owner, jnp.ones_like(score), 0.0)
      acc = jnp.where(owner, jnp.broadcast_to(value.astype(jnp.float32)[None, :], (rows, head_dim)), 0.0)

      def add_block(i, carry):
        top, total, acc = carry
        at = i * _BLOCK + jnp.arange(_BLOCK)
        seen = at < stop
        if window is not None:
          seen &= at > position - window

        def load(ref, lane, size):
          mask = jnp.broadcast_to(seen[:, None], (_BLOCK, size))
          return plt.load(ref.at[b, pl.ds(i * _BLOCK, _BLOCK), h, pl.ds(lane, size)], mask=mask, other=0.0)

        scores = plt.dot(q_first, load(keys_ref, 0, half), trans_b=True)
        scores = (scores + plt.dot(q_second, load(keys_ref, half, half), trans_b=True)) * scale
        visible = jnp.broadcast_to(seen[None, :], scores.shape)
        scores = jnp.where(visible, scores, _NOTHING)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(visible, jnp.exp(scores - higher[:, None]), 0.0)
        shrink = jnp.exp(top - higher)
        acc = acc * shrink[:, None] + plt.dot(weights.astype(dtype), load(values_ref, 0, head_dim))
        return higher, total * shrink + jnp.sum(weights, axis=1), acc

      blocks = lax.div(start, _BLOCK), lax.div(stop + _BLOCK - 1, _BLOCK)
      return _merge(softmax, lax.fori_loop(*blocks, add_block, (top, total, acc)))

    top, total, acc = lax.fori_loop(begin, end, merge_chunk, _no_chunks(rows, head_dim))
    if parts == 1:
      acc = acc / total[:, None]
    else:
      plt.store(max_ref.at[b, part, pl.ds(h * group, rows)], top, mask=in_group)
      plt.store(sum_ref.at[b, part, pl.ds(h * group, rows)], total, mask=in_group)
    mask = jnp.broadcast_to(in_group[:, None], (rows, head_dim))
    plt.store(out_ref.at[b, part, pl.ds(h * group, rows), :], acc.astype(out_ref.dtype), mask=mask)


def _combine_kernel(acc_ref, max_ref, sum_ref, position_ref, out_ref, *, length, window):
  """out[b, h] = sum over chunks of acc * exp(max - top) / sum over chunks of sum * exp(max - top)."""
  b, head = pl.program_id(0), pl.ds(pl.program_id(1), 1)
  first, last = _visible_chunks(position_ref[b], length, window)

  def merge_chunk(chunk, softmax):
    return _merge(softmax, (max_ref[b, chunk, head], sum_ref[b, chunk, head], acc_ref[b, chunk, head, :]))

  _, total, acc = lax.fori_loop(first, last + 1, merge_chunk, _no_chunks(1, acc_ref.shape[3]))
  out_ref[b, head, :] = (acc / total[:, None]).astype(out_ref.dtype)


# A jit of its own: the layers of a model then share one trace and one lowering of the kernel.
@functools.partial(jax.jit, static_argnames=("window", "interpret"))
def decode_attention(
  qkv: Float[Array, "B heads D"],
  keys: Float[Array, "B S Hkv D"],
  values: Float[Array, "B S Hkv D"],
  position: Int32[Array, " B"],
  cos: Float32[Array, "B pairs"],
  sin: Float32[Array, "B pairs"],
  *,
  window: int | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, "B queries D"], Float[Array, "B S Hkv D"], Float[Array, "B S Hkv D"]]:
  """softmax(q k^T / sqrt(D)) v for one new token a row, and the cache with its key and value written.

  Query head i attends to key head i // (H / Hkv). Scores, softmax and sums are float32; the numerator is rounded to
  the cache's dtype before it multiplies the values (FlashAttention, arXiv 2205.14135, algorithm 1; split over the
  cache as in Flash-Decoding).

  Args:
    qkv: the new token's H query heads, then its Hkv keys, then its Hkv values, before rotation.
    keys, values: the cache; updated in place where their buffers are donated.
    position: where the new token stands. It sees itself and the cache at position - window < p < position. A position
      beyond the cache is not written.
    cos, sin: of the rotation angle of each pair (x[i], x[i + D/2]).
    window: how many keys a token sees, itself included; None is all of them.
    interpret: run the kernels' bodies on the CPU, for tests.
  """
  batch, length, kv_heads, head_dim = keys.shape
  heads = qkv.shape[1] - 2 * kv_heads
  chunks = math.ceil(length / _CHUNK)
  parts = 1 if batch * kv_heads >= _FILLING_PROGRAMS and chunks <= _MOST_CHUNKS else chunks
  cache = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
  partial = jax.ShapeDtypeStruct((batch, parts, heads), jnp.float32)
  acc, top, total, keys, values = pl.pallas_call(
    functools.partial(_attend_kernel, heads=heads, window=window),
    out_shape=(
      jax.ShapeDtypeStruct((batch, parts, heads, head_dim), qkv.dtype if parts == 1 else jnp.float32),
      partial,
      partial,
      cache,
      cache,
    ),
    grid=(batch, kv_heads, parts),
    input_output_aliases={4: 3, 5: 4},
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name="decode_attention",
  )(qkv, position, cos, sin, keys, values)
  if parts == 1:
    return acc[:, 0], keys, values
  out = pl.pallas_call(
    functools.partial(_combine_kernel, length=length, window=window),
    out_shape=jax.ShapeDtypeStruct((batch, heads, head_dim), qkv.dtype),
    grid=(batch, heads),
    compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
    interpret=interpret,
    name="decode_attention_combine",
  )(acc, top, total, position)
  return out, keys, values
