# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax.models.kv_cache import write
from marlin_jax.models.layers import attend, rotate
from pallas_kernels.attention import unsupported_reason
from pallas_kernels.decode_attention import decode_attention as decode_attention_with_arrivals
from pallas_kernels.hardware import Device
from tests.pallas_kernels.attention_problems import angles, normal

# In a cache of 520: nothing but the new token, a chunk's last position, the next one's first and second, the last.
BORDERS = [0, 255, 256, 257, 511, 512, 519, 30]


def problem(rng, batch, length, heads=4, kv_heads=2, head_dim=32, dtype=jnp.bfloat16):
  return (
    normal(rng, batch, heads + 2 * kv_heads, head_dim, dtype=dtype),
    normal(rng, batch, length, kv_heads, head_dim, dtype=dtype),
    normal(rng, batch, length, kv_heads, head_dim, dtype=dtype),
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


def decode_attention(qkv, keys, values, *others, **options):
  """With zeros in which programs count themselves; they must be zeros again after it."""
  arrivals = jnp.zeros((keys.shape[0], keys.shape[2]), jnp.int32)
  *results, arrivals = decode_attention_with_arrivals(qkv, keys, values, arrivals, *others, **options)
  np.testing.assert_array_equal(arrivals, 0)
  return tuple(results)


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
  cos, sin = angles(position[:, None], head_dim)
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
    (520, BORDERS, None),
    (520, BORDERS, 70),
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


@pytest.mark.parametrize(("batch", "length", "window"), [(4, 100, None), (4, 100, 50), (4, 300, None), (4, 300, 50)])
def test_a_token_beyond_the_cache_is_not_written_and_stays_finite(rng, batch, length, window):
  qkv, keys, values = problem(rng, batch, length)
  position = jnp.array([length, 1000] * (batch // 2), jnp.int32)
  run = functools.partial(decode_attention, window=window, interpret=True)
  arguments = qkv, keys, values, position, *rope(position)
  out, new_keys, new_values = run(*arguments)
  assert jnp.isfinite(out.astype(jnp.float32)).all()
  np.testing.assert_array_equal(new_keys, keys)
  np.testing.assert_array_equal(new_values, values)
  few, *cache = run(*(array[:2] for array in arguments))
  np.testing.assert_array_equal(few, out[:2])
  np.testing.assert_array_equal(cache, [keys[:2], values[:2]])


# An empty chunk stores nothing, and the interpreter's memory is NaN until something is stored.
@pytest.mark.parametrize(("length", "window"), [(200, None), (520, None), (520, 300)])
def test_what_lies_beyond_the_row_is_never_read(rng, length, window):
  rows = len(BORDERS)
  qkv, keys, values = problem(rng, rows, length)
  position = jnp.array([min(p, length - 1) for p in BORDERS], jnp.int32)
  distance = position[:, None, None, None] - jnp.arange(length)[None, :, None, None]
  seen = distance > 0 if window is None else (distance > 0) & (distance < window)
  # The rows, and the same rows with NaN wherever they do not see.
  poisoned = (jnp.concatenate([array, jnp.where(seen, array, jnp.nan)]) for array in (keys, values))
  qkv, position = jnp.concatenate([qkv, qkv]), jnp.concatenate([position, position])
  out, _, _ = decode_attention(qkv, *poisoned, position, *rope(position), window=window, interpret=True)
  assert jnp.isfinite(out.astype(jnp.float32)).all()
  np.testing.assert_array_equal(out[rows:], out[:rows])


@pytest.mark.parametrize(("length", "window"), [(256, None), (520, None), (520, 300)])
def test_a_row_gets_the_same_bits_in_any_batch_and_any_length_of_cache(rng, length, window):
  qkv, keys, values = problem(rng, len(BORDERS), length)
  position = jnp.array([min(p, length - 1) for p in BORDERS], jnp.int32)
  together, _ = check((qkv, keys, values, position, *rope(position)), window=window, interpret=True)
  for row in range(len(BORDERS)):
    one = slice(row, row + 1)
    longer = [jnp.pad(array[one], ((0, 0), (0, 500), (0, 0), (0, 0))) for array in (keys, values)]
    alone, _, _ = decode_attention(
      qkv[one], *longer, position[one], *rope(position[one]), window=window, interpret=True
    )
    np.testing.assert_array_equal(alone, together[one])


@pytest.mark.parametrize(("batch", "length"), [(1, 128), (16, 128), (15, 256), (16, 2048), (1, 1000)])
@pytest.mark.parametrize("window", [None, 4096])
def test_it_is_one_kernel_for_an_h200(lower_for_h200, batch, length, window):
  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)

  cache = shape(batch, length, 8, 128)
  angle = shape(batch, 64, dtype=jnp.float32)
  position = shape(batch, dtype=jnp.int32)
  run = functools.partial(decode_attention_with_arrivals, window=window)
  arrivals = shape(batch, 8, dtype=jnp.int32)
  text = lower_for_h200(run, shape(batch, 48, 128), cache, cache, arrivals, position, angle, angle)
  assert text.count("__gpu$xla.gpu.triton") == 1


def test_what_it_cannot_do_it_says():
  gpu = Device(platform="cuda", kind="NVIDIA H200", num_sms=132)
  assert unsupported_reason(jnp.dtype(jnp.bfloat16), 128, gpu) is None
  assert "float32" in unsupported_reason(jnp.dtype(jnp.float32), 128, gpu)
  assert "head_dim=80" in unsupported_reason(jnp.dtype(jnp.bfloat16), 80, gpu)
  assert "cpu" in unsupported_reason(jnp.dtype(jnp.bfloat16), 128, Device(platform="cpu", kind="cpu", num_sms=0))


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("batch", "length", "window"),
  [
    (1, 128, None),
    (16, 128, None),
    (128, 128, None),
    (8, 256, 100),
    (4, 2048, None),
    (4, 2048, 500),
    (16, 2048, None),
    (16, 2048, 500),
  ],
)
def test_on_a_gpu(rng, batch, length, window):
  position = jnp.asarray(rng.integers(0, length, batch), jnp.int32)
  arguments = (*problem(rng, batch, length, 32, 8, 128), position, *rope(position, 128))
  out, _ = check(arguments, window=window)
  for _ in range(5):
    np.testing.assert_array_equal(decode_attention(*arguments, window=window)[0], out)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("batch", [3, 16])
def test_on_a_gpu_a_row_gets_the_same_bits_in_a_longer_cache(rng, batch, window):
  position = jnp.asarray([0, 30, 128, 255] * 4, jnp.int32)[-batch:]
  qkv, keys, values = problem(rng, batch, 256, 32, 8, 128)
  longer = [jnp.pad(array, ((0, 0), (0, 1792), (0, 0), (0, 0))) for array in (keys, values)]
  angles = rope(position, 128)
  short, _, _ = decode_attention(qkv, keys, values, position, *angles, window=window)
  np.testing.assert_array_equal(decode_attention(qkv, *longer, position, *angles, window=window)[0], short)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 700])
def test_on_a_gpu_a_row_gets_the_same_bits_in_any_batch(rng, window):
  borders = [0, 1, 63, 64, 255, 256, 257, 511, 512, 700, 1023, 1024, 1500, 2000, 2046, 2047]
  position = jnp.array(borders, jnp.int32)
  arguments = (*problem(rng, 16, 2048, 32, 8, 128), position, *rope(position, 128))
  together = decode_attention(*arguments, window=window)
  for row in range(16):
    alone = decode_attention(*(array[row : row + 1] for array in arguments), window=window)
    for one, all_rows in zip(alone, together, strict=True):
      np.testing.assert_array_equal(one[0], all_rows[row])
