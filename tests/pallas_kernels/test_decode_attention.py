# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax.models.config import ModelConfig
from marlin_jax.models.kv_cache import write
from marlin_jax.models.layers import attend, rope_table, rotate
from pallas_kernels.decode_attention import decode_attention, unsupported_reason
from pallas_kernels.hardware import Device

CONFIG = ModelConfig(
  vocab_size=8,
  hidden_size=64,
  intermediate_size=64,
  num_layers=1,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  max_position_embeddings=1024,
)


def problem(rng, batch, length, heads=4, kv_heads=2, head_dim=32, dtype=jnp.bfloat16):
  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)

  return (
    normal(batch, heads + 2 * kv_heads, head_dim),
    normal(batch, length, kv_heads, head_dim),
    normal(batch, length, kv_heads, head_dim),
  )


def reference(qkv, keys, values, position, cos, sin, *, window=None):
  """What the decoder does without the kernel, in float32 where that rounds less."""
  kv_heads = keys.shape[2]
  q, k, v = jnp.split(qkv[:, None], [qkv.shape[1] - 2 * kv_heads, qkv.shape[1] - kv_heads], axis=2)
  rope = cos[:, None], sin[:, None]
  keys, values = write(keys, rotate(k, rope), position), write(values, v, position)
  arguments = (array.astype(jnp.float32) for array in (rotate(q, rope), keys, values))
  out = attend(*arguments, position[:, None], window)
  return out.reshape(q[:, 0].shape), keys, values


def check(arguments, **options):
  out, keys, values = decode_attention(*arguments, **options)
  options.pop("interpret", None)
  want, want_keys, want_values = jax.jit(functools.partial(reference, **options))(*arguments)
  tolerance = 2.0 ** (-7 if arguments[0].dtype == jnp.bfloat16 else -9)
  np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=tolerance, atol=tolerance)
  np.testing.assert_array_equal(values, want_values)
  # A product and a sum may be one instruction, rounded once.
  np.testing.assert_allclose(keys.astype(jnp.float32), want_keys.astype(jnp.float32), rtol=2.0**-7, atol=1e-6)
  return out, keys


def rope(position, head_dim=32):
  cos, sin = rope_table(dataclasses.replace(CONFIG, head_dim=head_dim), position[:, None])
  return cos[:, 0], sin[:, 0]


# Positions: the first, inside a block, a block's last and first, a chunk's first and last, the cache's last; with a
# window, keys seen in one block of a chunk, in both, in two chunks.
@pytest.mark.parametrize(
  ("length", "positions", "window"),
  [
    (80, [0, 5, 63, 79], None),
    (256, [100, 127, 128, 129, 255], None),
    (256, [64, 128, 129, 255], 3),
    (256, [60, 200, 255], 130),
    (600, [3, 128, 255, 256, 400, 511, 599], None),
    (600, [3, 255, 256, 511, 599], 70),
  ],
)
def test_the_kernel_is_rotation_write_and_attend(rng, length, positions, window):
  position = jnp.array(positions, jnp.int32)
  arguments = (*problem(rng, len(positions), length), position, *rope(position))
  check(arguments, window=window, interpret=True)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(5, 1, 32), (2, 2, 64), (2, 1, 256)])
def test_any_number_of_query_heads_a_key_head(rng, heads, kv_heads, head_dim):
  position = jnp.array([70], jnp.int32)
  check((*problem(rng, 1, 96, heads, kv_heads, head_dim), position, *rope(position, head_dim)), interpret=True)


def test_float16(rng):
  position = jnp.array([40], jnp.int32)
  check((*problem(rng, 1, 64, dtype=jnp.float16), position, *rope(position)), interpret=True)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("length", [100, 300])
def test_a_token_beyond_the_cache_is_not_written_and_stays_finite(rng, length, window):
  qkv, keys, values = problem(rng, 2, length)
  position = jnp.array([length, 1000], jnp.int32)
  run = functools.partial(decode_attention, window=window, interpret=True)
  out, new_keys, new_values = run(qkv, keys, values, position, *rope(position))
  assert jnp.isfinite(out.astype(jnp.float32)).all()
  np.testing.assert_array_equal(new_keys, keys)
  np.testing.assert_array_equal(new_values, values)


@pytest.mark.parametrize(("length", "position", "window"), [(200, 100, None), (300, 100, None), (256, 200, 20)])
def test_what_lies_beyond_the_row_is_never_read(rng, length, position, window):
  qkv, keys, values = problem(rng, 1, length)
  at = jnp.arange(length)[None, :, None, None]
  poison = at >= position if window is None else (at >= position) | (at <= position - window)
  position = jnp.array([position], jnp.int32)
  run = functools.partial(decode_attention, window=window, interpret=True)
  out, _, _ = run(qkv, keys, values, position, *rope(position))
  poisoned = (jnp.where(poison, jnp.nan, array) for array in (keys, values))
  np.testing.assert_array_equal(run(qkv, *poisoned, position, *rope(position))[0], out)


# A cache of one chunk, which needs no second kernel, and one of several.
@pytest.mark.parametrize(("length", "positions"), [(256, [200, 30, 255]), (600, [400, 30, 599])])
def test_a_row_gets_the_same_bits_in_any_batch_and_any_length_of_cache(rng, length, positions):
  qkv, keys, values = problem(rng, 3, length)
  position = jnp.array(positions, jnp.int32)
  run = functools.partial(decode_attention, interpret=True)
  together, _, _ = run(qkv, keys, values, position, *rope(position))
  for row in range(3):
    one = slice(row, row + 1)
    longer = [jnp.pad(array[one], ((0, 0), (0, 500), (0, 0), (0, 0))) for array in (keys, values)]
    alone, _, _ = run(qkv[one], *longer, position[one], *rope(position[one]))
    np.testing.assert_array_equal(alone, together[one])


@pytest.mark.parametrize("length", [128, 256, 1000])
def test_it_lowers_for_an_h200(lower_for_h200, length):
  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)

  cache = shape(16, length, 8, 128)
  angle = shape(16, 64, dtype=jnp.float32)
  position = shape(16, dtype=jnp.int32)
  run = functools.partial(decode_attention, window=4096)
  text = lower_for_h200(run, shape(16, 48, 128), cache, cache, position, angle, angle)
  assert text.count("__gpu$xla.gpu.triton") == (1 if length <= 256 else 2)


def test_what_it_cannot_do_it_says():
  gpu = Device(platform="cuda", kind="NVIDIA H200", num_sms=132)
  assert unsupported_reason(jnp.dtype(jnp.bfloat16), 128, gpu) is None
  assert "float32" in unsupported_reason(jnp.dtype(jnp.float32), 128, gpu)
  assert "head_dim=80" in unsupported_reason(jnp.dtype(jnp.bfloat16), 80, gpu)
  assert "cpu" in unsupported_reason(jnp.dtype(jnp.bfloat16), 128, Device(platform="cpu", kind="cpu", num_sms=0))


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("batch", "length", "window"),
  [(1, 128, None), (16, 128, None), (128, 128, None), (8, 256, 100), (16, 2048, None), (4, 2048, 500)],
)
def test_on_a_gpu(rng, batch, length, window):
  position = jnp.asarray(rng.integers(0, length, batch), jnp.int32)
  arguments = (*problem(rng, batch, length, 32, 8, 128), position, *rope(position, 128))
  out, _ = check(arguments, window=window)
  for _ in range(5):
    np.testing.assert_array_equal(decode_attention(*arguments, window=window)[0], out)


@pytest.mark.gpu
def test_on_a_gpu_a_row_gets_the_same_bits_in_a_longer_cache(rng):
  position = jnp.array([30, 128, 255], jnp.int32)
  qkv, keys, values = problem(rng, 3, 256, 32, 8, 128)
  longer = [jnp.pad(array, ((0, 0), (0, 500), (0, 0), (0, 0))) for array in (keys, values)]
  angles = rope(position, 128)
  short, _, _ = decode_attention(qkv, keys, values, position, *angles)
  np.testing.assert_array_equal(decode_attention(qkv, *longer, position, *angles)[0], short)
