# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token a row over a key-value cache, Triton-lowered: rotates, writes the cache, attends.

    program (row, key head, chunk)    a softmax of its own over the chunk's 256 positions; the program that has the new
                                      token's chunk also rotates and stores the new key and stores the new value
    the last of those of a row and    merges what they left in device memory, in the order of the positions, so that it
    key head to arrive                does not matter who was last

A program whose chunk holds nothing that the row sees leaves at once, and one that has all the row sees asks nobody.
Chunks and blocks lie at the same positions whatever the batch and the length of the cache: what a row gets depends on
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

from pallas_kernels.attention import BLOCK, NOTHING, Softmax, rotated, score_factor

_CHUNK = 256


def _visible_chunks(position, length, window):
  """(first, last) chunk that holds a key which the row sees; `last` is the new token's, also beyond the cache."""
  if length <= _CHUNK:
    return 0, 0  # static: the compiler sees how few blocks there are, and of 128 positions loads none within the loop
  last = jnp.minimum(lax.div(position, _CHUNK), math.ceil(length / _CHUNK) - 1)
  first = 0 if window is None else lax.div(jnp.maximum(position - window + 1, 0), _CHUNK)
  return jnp.minimum(first, last), last


def _kernel(
  qkv_ref,
  position_ref,
  cos_ref,
  sin_ref,
  _keys_ref,
  _values_ref,
  _arrivals_ref,
  out_ref,
  acc_ref,
  max_ref,
  sum_ref,
  keys_ref,
  values_ref,
  arrivals_ref,
  *,
  heads,
  window,
  interpret,
):
  """out[b, heads of h] = softmax over the visible keys of q k^T / sqrt(D), times v; each chunk apart, then merged.

  The loop takes the keys that are in the cache already; the new one is the first term of its chunk, from registers.
  """
  _, length, kv_heads, head_dim = keys_ref.shape
  half, group, dtype = head_dim // 2, heads // kv_heads, keys_ref.dtype
  rows = max(16, 1 << (group - 1).bit_length())  # a matrix instruction has 16 rows; those beyond the group are zero
  b, h, chunk = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  position = position_ref[b]
  first, last = _visible_chunks(position, length, window)
  in_group = jnp.arange(rows) < group
  of_group = pl.ds(h * group, rows)

  def store_out(softmax):
    out = (softmax.acc / softmax.total[:, None]).astype(out_ref.dtype)
    plt.store(out_ref.at[b, of_group, :], out, mask=jnp.broadcast_to(in_group[:, None], out.shape))

  def softmax_of_chunk():
    cos, sin = cos_ref[b, :], sin_ref[b, :]
    mask = jnp.broadcast_to(in_group[:, None], (rows, half))

    def load_queries(lane):
      return plt.load(qkv_ref.at[b, of_group, pl.ds(lane, half)], mask=mask, other=0.0)

    q_first, q_second = rotated(load_queries(0), load_queries(half), cos[None, :], sin[None, :], dtype)
    halves = (qkv_ref[b, heads + h, pl.ds(lane, half)] for lane in (0, half))
    k_first, k_second = rotated(*halves, cos, sin, dtype)
    value = qkv_ref[b, heads + kv_heads + h, :]
    owner = chunk == last

    @pl.when(owner & (position < length))
    def _():
      keys_ref[b, position, h, pl.ds(0, half)] = k_first
      keys_ref[b, position, h, pl.ds(half, half)] = k_second
      values_ref[b, position, h, :] = value

    scale = score_factor(head_dim)

    def product(q, k):
      return jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[None, :], axis=1)

    score = (product(q_first, k_first) + product(q_second, k_second)) * scale
    start = chunk * _CHUNK
    stop = jnp.minimum(jnp.minimum(start + _CHUNK, position), length)
    if window is not None:
      start = jnp.maximum(start, position - window + 1)
    mine = Softmax(
      top=jnp.where(owner, score, NOTHING),
      total=jnp.where(owner, jnp.ones_like(score), 0.0),
      acc=jnp.where(owner, jnp.broadcast_to(value.astype(jnp.float32)[None, :], (rows, head_dim)), 0.0),
    )

    def add_block(i, softmax):
      at = i * BLOCK + jnp.arange(BLOCK)
      seen = at < stop
      if window is not None:
        seen &= at > position - window

      def load(ref, lane, size):
        mask = jnp.broadcast_to(seen[:, None], (BLOCK, size))
        return plt.load(ref.at[b, pl.ds(i * BLOCK, BLOCK), h, pl.ds(lane, size)], mask=mask, other=0.0)

      scores = plt.dot(q_first, load(keys_ref, 0, half), trans_b=True)
      scores = (scores + plt.dot(q_second, load(keys_ref, half, half), trans_b=True)) * scale
      return softmax.add(scores, jnp.broadcast_to(seen[None, :], scores.shape), load(values_ref, 0, head_dim))

    blocks = lax.div(start, BLOCK), lax.div(stop + BLOCK - 1, BLOCK)
    return lax.fori_loop(*blocks, add_block, mine)

  if length <= _CHUNK:
    store_out(softmax_of_chunk())
    return

  @pl.when((first <= chunk) & (chunk <= last))
  def _():
    softmax = softmax_of_chunk()
    pl.when(first == last)(lambda: store_out(softmax))

    @pl.when(first < last)
    def _():
      mask = jnp.broadcast_to(in_group[:, None], softmax.acc.shape)
      plt.store(max_ref.at[b, chunk, of_group], softmax.top, mask=in_group)
      plt.store(sum_ref.at[b, chunk, of_group], softmax.total, mask=in_group)
      plt.store(acc_ref.at[b, chunk, of_group, :], softmax.acc, mask=mask)
      if not interpret:  # which has one thread
        plt.debug_barrier()  # all threads have stored before one arrives for all of them, which releases and acquires
      arrived = plt.atomic_add(arrivals_ref, (b, h), jnp.int32(1))

      @pl.when(arrived == last - first)
      def _():
        def merge_chunk(i, softmax):
          chunk = Softmax(
            top=plt.load(max_ref.at[b, i, of_group], mask=in_group, other=NOTHING),
            total=plt.load(sum_ref.at[b, i, of_group], mask=in_group, other=1.0),
            acc=plt.load(acc_ref.at[b, i, of_group, :], mask=mask, other=0.0),
          )
          return softmax.merge(chunk)

        store_out(lax.fori_loop(first, last + 1, merge_chunk, Softmax.empty(rows, head_dim)))
        arrivals_ref[b, h] = 0


# A jit of its own: the layers of a model then share one trace and one lowering of the kernel.
@functools.partial(jax.jit, static_argnames=("window", "interpret"))
def decode_attention(
  qkv: Float[Array, "B heads D"],
  keys: Float[Array, "B S Hkv D"],
  values: Float[Array, "B S Hkv D"],
  arrivals: Int32[Array, "B Hkv"],
  position: Int32[Array, " B"],
  cos: Float32[Array, "B pairs"],
  sin: Float32[Array, "B pairs"],
  *,
  window: int | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, "B queries D"], Float[Array, "B S Hkv D"], Float[Array, "B S Hkv D"], Int32[Array, "B Hkv"]]:
  """softmax(q k^T / sqrt(D)) v for one new token a row, and the cache with its key and value written.

  Query head i attends to key head i // (H / Hkv). Scores, softmax and sums are float32; the numerator is rounded to
  the cache's dtype before it multiplies the values (FlashAttention, arXiv 2205.14135, algorithm 1; split over the
  cache as in Flash-Decoding).

  Args:
    qkv: the new token's H query heads, then its Hkv keys, then its Hkv values, before rotation.
    keys, values: the cache; updated in place where their buffers are donated.
    arrivals: zeros, in which programs count themselves; comes back as zeros, for the next call.
    position: where the new token stands. It sees itself and the cache at position - window < p < position. A position
      beyond the cache is not written.
    cos, sin: of the rotation angle of each pair (x[i], x[i + D/2]).
    window: how many keys a token sees, itself included; None is all of them.
    interpret: run the kernel's body on the CPU, for tests.
  """
  batch, length, kv_heads, head_dim = keys.shape
  heads = qkv.shape[1] - 2 * kv_heads
  chunks = math.ceil(length / _CHUNK)
  shape = jax.ShapeDtypeStruct
  of_chunks = (batch, chunks, heads)
  out, *_, keys, values, arrivals = pl.pallas_call(
    functools.partial(_kernel, heads=heads, window=window, interpret=interpret),
    out_shape=(
      shape((batch, heads, head_dim), qkv.dtype),
      shape((*of_chunks, head_dim), jnp.float32),
      shape(of_chunks, jnp.float32),
      shape(of_chunks, jnp.float32),
      *(shape(array.shape, array.dtype) for array in (keys, values, arrivals)),
    ),
    grid=(batch, kv_heads, chunks),
    input_output_aliases={4: 4, 5: 5, 6: 6},
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name="decode_attention",
  )(qkv, position, cos, sin, keys, values, arrivals)
  return out, keys, values, arrivals
