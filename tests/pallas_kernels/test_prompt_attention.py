# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax.models.kv_cache import KVCache, read, write
from marlin_jax.models.layers import attend, rotate
from pallas_kernels.prompt_attention import prompt_attention
from tests.pallas_kernels.attention_problems import angles, normal


def problem(rng, starts, tokens, length, heads=4, kv_heads=2, head_dim=32, dtype=jnp.bfloat16):
  """Queries, keys and values of new tokens, a cache, and where they stand; sequence b has row b + 1 of the cache."""
  batch, start = len(starts), jnp.asarray(starts, jnp.int32)
  cache = (normal(rng, batch + 1, length, kv_heads, head_dim, dtype=dtype) for _ in range(2))
  qkv = normal(rng, batch, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
  row = jnp.arange(1, batch + 1, dtype=jnp.int32)
  return qkv, *cache, row, start, *angles(start[:, None] + jnp.arange(tokens), head_dim)


def reference(qkv, keys, values, row, start, cos, sin, *, length, window=None):
  """What the decoder does without the kernel, in float32 where that rounds less."""
  kv_heads = keys.shape[2]
  q, k, v = jnp.split(qkv, [qkv.shape[2] - 2 * kv_heads, qkv.shape[2] - kv_heads], axis=2)
  rope, out = (cos, sin), []
  q, k = rotate(q, rope), rotate(k, rope)
  positions = start[:, None] + jnp.arange(qkv.shape[1])
  for b in range(len(qkv)):
    here = KVCache(keys=(keys,), values=(values,)).view(length, row[b])
    one = slice(b, b + 1)
    new_keys, new_values = write(here.keys[0], k[one], start[one]), write(here.values[0], v[one], start[one])
    arguments = (array.astype(jnp.float32) for array in (q[one], read(new_keys), read(new_values)))
    out.append(attend(*arguments, positions[one], window).reshape(q[one].shape))
    keys, values = new_keys.buffer, new_values.buffer
  return jnp.concatenate(out), keys, values


def check(arguments, *, length, window=None, interpret=False):
  options = {"length": length, "window": window}
  got = prompt_attention(*arguments, **options, interpret=interpret)
  want = jax.jit(functools.partial(reference, **options))(*arguments)
  tolerance = 2.0 ** (-7 if arguments[0].dtype == jnp.bfloat16 else -9)
  inside = (arguments[4][:, None] + jnp.arange(arguments[0].shape[1]) < length)[:, :, None, None]
  out, want_out = (jnp.where(inside, array.astype(jnp.float32), 0) for array in (got[0], want[0]))
  np.testing.assert_allclose(out, want_out, rtol=tolerance, atol=tolerance)
  # A product and a sum may be one instruction, rounded once.
  keys, want_keys = (array.astype(jnp.float32) for array in (got[1], want[1]))
  np.testing.assert_allclose(keys, want_keys, rtol=2.0**-7, atol=1e-6)
  np.testing.assert_array_equal(got[2], want[2])
  return got


# Chunks shorter than a program's 64 tokens, as long, longer, and no multiple; behind nothing, within a block of the
# cache, at its border; windows of less than a chunk, of more, and of a part of the cache.
@pytest.mark.parametrize(
  ("starts", "tokens", "length", "window"),
  [
    ([0], 3, 16, None),
    ([0, 0], 16, 16, None),
    ([0, 5], 17, 40, None),
    ([0, 64, 100], 64, 200, None),
    ([0, 63, 65], 130, 300, None),
    ([0, 5, 30], 20, 64, 4),
    ([0, 100, 128], 100, 256, 70),
    ([200], 150, 400, 130),
    ([300], 16, 400, 100),
  ],
)
def test_the_kernel_is_rotation_write_and_attend(rng, starts, tokens, length, window):
  check(problem(rng, starts, tokens, length), length=length, window=window, interpret=True)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(5, 1, 32), (2, 2, 64), (2, 1, 256)])
def test_any_number_of_query_heads_a_key_head(rng, heads, kv_heads, head_dim):
  check(problem(rng, [7], 20, 40, heads, kv_heads, head_dim), length=40, interpret=True)


def test_float16(rng):
  check(problem(rng, [7], 20, 40, dtype=jnp.float16), length=40, interpret=True)


# Padding at the end of a prompt may stand beyond what is in use of the row, and beyond the row.
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("start", "length"), [(40, 48), (90, 100), (100, 64)])
def test_a_token_beyond_the_length_is_not_written_and_stays_finite(rng, start, length, window):
  arguments = problem(rng, [start], 32, 100)
  out, keys, values = check(arguments, length=length, window=window, interpret=True)
  assert jnp.isfinite(out.astype(jnp.float32)).all()
  np.testing.assert_array_equal(keys[:, length:], arguments[1][:, length:])
  np.testing.assert_array_equal(values[:, length:], arguments[2][:, length:])


@pytest.mark.parametrize("window", [None, 50])
def test_what_lies_behind_the_chunk_and_in_other_rows_is_never_read(rng, window):
  qkv, keys, values, row, start, cos, sin = problem(rng, [0, 70], 40, 200)
  position = jnp.arange(200)
  seen = position < jnp.concatenate([jnp.zeros(1, int), start])[:, None]
  if window is not None:
    seen &= position > jnp.concatenate([jnp.zeros(1, int), start])[:, None] - window
  poisoned = (jnp.where(seen[..., None, None], array, jnp.nan) for array in (keys, values))
  run = functools.partial(prompt_attention, length=200, window=window, interpret=True)
  clean, *_ = run(qkv, keys, values, row, start, cos, sin)
  out, *_ = run(qkv, *poisoned, row, start, cos, sin)
  np.testing.assert_array_equal(out, clean)


def test_a_token_gets_the_same_bits_in_one_chunk_and_in_several(rng):
  qkv, keys, values, row, start, cos, sin = problem(rng, [30], 150, 200)
  together, *_ = check((qkv, keys, values, row, start, cos, sin), length=200, interpret=True)
  parts = []
  for chunk in (slice(0, 64), slice(64, 74), slice(74, 150)):
    part, keys, values = prompt_attention(
      qkv[:, chunk], keys, values, row, start + chunk.start, cos[:, chunk], sin[:, chunk], length=200, interpret=True
    )
    parts.append(part)
  np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), together)


def test_a_sequence_gets_the_same_bits_in_any_batch_any_row_and_any_length_of_cache(rng):
  arguments = problem(rng, [0, 30, 64], 70, 150)
  together, *_ = check(arguments, length=150, interpret=True)
  qkv, keys, values, _, start, cos, sin = arguments
  for b in range(3):
    one = slice(b, b + 1)
    longer = (jnp.pad(array[b + 1][None], ((2, 0), (0, 500), (0, 0), (0, 0))) for array in (keys, values))
    alone, *_ = prompt_attention(
      qkv[one], *longer, jnp.array([2], jnp.int32), start[one], cos[one], sin[one], length=140, interpret=True
    )
    np.testing.assert_array_equal(alone, together[one])


@pytest.mark.parametrize(
  ("batch", "tokens", "length"), [(1, 16, 16), (1, 64, 64), (1, 256, 2048), (16, 64, 64), (1, 2047, 2047)]
)
@pytest.mark.parametrize("window", [None, 100])
def test_it_is_two_kernels_for_an_h200(lower_for_h200, batch, tokens, length, window):
  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)

  cache, angle = shape(16, 2048, 8, 128), shape(batch, tokens, 64, dtype=jnp.float32)
  place = shape(batch, dtype=jnp.int32)
  run = functools.partial(prompt_attention, length=length, window=window)
  text = lower_for_h200(run, shape(batch, tokens, 48, 128), cache, cache, place, place, angle, angle)
  assert text.count("__gpu$xla.gpu.triton") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
  ("starts", "tokens", "length"),
  [([0], 16, 16), ([0], 64, 64), ([64], 64, 128), ([1792], 256, 2048), ([0, 10, 100], 200, 512), ([0], 2048, 2048)],
)
def test_on_a_gpu(rng, starts, tokens, length, window):
  arguments = problem(rng, starts, tokens, length, 32, 8, 128)
  out, *_ = check(arguments, length=length, window=window)
  for _ in range(5):
    again, *_ = prompt_attention(*arguments, length=length, window=window)
    np.testing.assert_array_equal(again, out)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(40, 8, 128), (4, 1, 256), (14, 2, 64), (4, 4, 32)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_on_a_gpu_any_heads(rng, heads, kv_heads, head_dim, dtype):
  check(problem(rng, [7, 130], 100, 256, heads, kv_heads, head_dim, dtype), length=240)
