# SPDX-License-Identifier: Apache-2.0
import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax.checkpoint import load_model
from marlin_jax.models import Decoder, KVCache, Llama3Rope, ModelConfig, decoder, layers, residual
from marlin_jax.models.kv_cache import read, write
from marlin_jax.models.layers import attend, rope_frequencies, rope_table, rotate

DATA = Path(__file__).parents[2] / "data"
CHECKPOINTS = ["llama-bf16", "llama3rope-tied-bf16", "mistral-sharded-bf16", "qwen2-bf16", "qwen3-bf16"]

TINY = ModelConfig(
  vocab_size=32,
  hidden_size=16,
  intermediate_size=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=64,
)

forward = nnx.jit(lambda model, tokens: model(tokens))


@partial(jax.jit, static_argnums=0)
def hidden_of(graphdef, weights, tokens, start, cache):
  return nnx.merge(graphdef, weights).hidden(tokens, start, cache)


def tiny(**changes) -> Decoder:
  config = dataclasses.replace(TINY, **changes)
  return Decoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=CHECKPOINTS)
def recorded(request):
  folder = DATA / request.param
  return folder, np.load(folder / "logits_fp32.npz"), np.load(folder / "logits_bf16.npz")


def test_float32_logits_are_the_recorded_ones(recorded):
  folder, fp32, _ = recorded
  logits = forward(load_model(folder, dtype=jnp.float32), jnp.asarray(fp32["input_ids"], jnp.int32))
  np.testing.assert_allclose(logits, fp32["logits"], rtol=0, atol=1e-4)


def test_bfloat16_logits_are_as_close_to_float32_as_the_reference_s(recorded):
  folder, fp32, bf16 = recorded
  logits = forward(load_model(folder), jnp.asarray(fp32["input_ids"], jnp.int32))
  ours, theirs = (np.sqrt(np.mean((x - fp32["logits"]) ** 2)) for x in (np.asarray(logits), bf16["logits"]))
  assert 0 < ours <= theirs


def test_greedy_tokens_through_the_cache_are_the_recorded_ones(recorded):
  folder, fp32, _ = recorded
  graphdef, weights = nnx.split(load_model(folder, dtype=jnp.float32))

  @partial(jax.jit, donate_argnums=3)
  def step(weights, tokens, start, cache):
    model = nnx.merge(graphdef, weights)
    hidden, cache = model.hidden(tokens, start, cache)
    return jnp.argmax(model.logits(hidden[:, -1]), axis=-1), cache

  tokens = jnp.asarray(fp32["input_ids"], jnp.int32)
  (rows, length), steps = tokens.shape, 16
  cache = KVCache.empty(nnx.merge(graphdef, weights).config, rows, length + steps, jnp.float32)
  chosen, cache = step(weights, tokens, jnp.zeros(rows, jnp.int32), cache)
  generated = [chosen]
  for i in range(steps - 1):
    chosen, cache = step(weights, chosen[:, None], jnp.full(rows, length + i, jnp.int32), cache)
    generated.append(chosen)
  np.testing.assert_array_equal(np.stack(generated, axis=1), fp32["greedy_ids"][:, length:])


@pytest.mark.parametrize("windows", [(None, None), (3, None)])
def test_rows_of_different_lengths_share_a_cache(windows):
  # Row 0 continues at position 5, row 1 at position 2; its padding was written to 2.. and must be overwritten unseen.
  model = tiny(sliding_windows=windows)
  rows = np.random.default_rng(0).integers(0, 32, (2, 9)).astype(np.int32)
  lengths = jnp.array([5, 2], jnp.int32)
  prompt = jnp.where(jnp.arange(5) < lengths[:, None], rows[:, :5], 0)
  _, cache = hidden_of(
    *nnx.split(model), prompt, jnp.zeros(2, jnp.int32), KVCache.empty(model.config, 2, 9, jnp.float32)
  )
  rest = jnp.stack([rows[0, 5:9], rows[1, 2:6]])
  hidden, _ = hidden_of(*nnx.split(model), rest, lengths, cache)
  logits = model.logits(hidden)
  full = forward(model, jnp.asarray(rows))
  np.testing.assert_allclose(logits[0], full[0, 5:9], atol=1e-5)
  np.testing.assert_allclose(logits[1], full[1, 2:6], atol=1e-5)


@pytest.mark.parametrize("left", [np.nan, np.inf])
def test_what_an_earlier_request_left_in_the_cache_is_not_seen(left):
  model = tiny()

  def hidden(filled_with):
    cache = jax.tree.map(lambda a: jnp.full_like(a, filled_with), KVCache.empty(model.config, 1, 9, jnp.float32))
    _, cache = hidden_of(*nnx.split(model), jnp.asarray([[3, 1, 4]]), jnp.zeros(1, jnp.int32), cache)
    return hidden_of(*nnx.split(model), jnp.asarray([[1]]), jnp.asarray([3]), cache)[0]

  np.testing.assert_array_equal(hidden(left), hidden(0.0))


def test_a_later_token_never_changes_an_earlier_logit():
  model = tiny()
  tokens = jnp.arange(8)[None]
  np.testing.assert_array_equal(forward(model, tokens)[:, :5], forward(model, tokens.at[:, 5:].set(31))[:, :5])


def test_a_sliding_window_forgets():
  # Two layers with windows of 3 reach back 4 positions together: token 0 reaches the logits of token 4 and no further.
  model = tiny(sliding_windows=(3, 3))
  tokens = jnp.arange(8)[None]
  before, after = forward(model, tokens), forward(model, tokens.at[0, 0].set(31))
  assert (before[0, 4] != after[0, 4]).any()
  np.testing.assert_array_equal(before[0, 5:], after[0, 5:])


def test_gradients_reach_every_parameter():
  model = tiny(qk_norm=True, qkv_bias=True, mlp_bias=True, output_bias=True)

  def loss(model):
    return -jax.nn.log_softmax(model(jnp.arange(6)[None]))[..., 3].mean()

  for path, gradient in nnx.to_flat_state(nnx.jit(nnx.grad(loss))(model)):
    assert np.isfinite(gradient[...]).all() and (gradient[...] != 0).any(), path


def test_the_tied_head_is_the_embedding():
  model = tiny(tie_word_embeddings=True)
  assert not hasattr(model, "lm_head")
  hidden = jnp.ones((3, 16), jnp.float32)
  np.testing.assert_allclose(model.logits(hidden), hidden @ model.embed.embedding[...].T, atol=1e-6)


def test_every_dense_layer_is_an_nnx_linear():
  names = {path[-1] for path, module in nnx.iter_modules(tiny()) if isinstance(module, nnx.Linear)}
  assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}


def test_attend_is_the_textbook_formula_a_head_at_a_time():
  rng = np.random.default_rng(0)
  queries, keys, values = (
    rng.standard_normal(s).astype(np.float32) for s in [(1, 2, 4, 8), (1, 5, 2, 8), (1, 5, 2, 8)]
  )
  out = attend(*map(jnp.asarray, (queries, keys, values)), positions=jnp.array([[2, 3]]), window=2)
  for t, position in enumerate((2, 3)):
    seen = slice(position - 1, position + 1)
    for head in range(4):
      scores = queries[0, t, head] @ keys[0, seen, head // 2].T / np.sqrt(8)
      weights = np.exp(scores) / np.exp(scores).sum()
      expected = weights @ values[0, seen, head // 2]
      np.testing.assert_allclose(out[0, t, 8 * head : 8 * head + 8], expected, rtol=1e-5, atol=1e-6)


def test_rotation_depends_on_the_distance_only():
  rng = np.random.default_rng(0)
  query, key = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

  def turned(x, position):
    return rotate(x, rope_table(TINY, jnp.array([[position]])))

  scores = [jnp.vdot(turned(query, p + 3), turned(key, p)) for p in (0, 11)]
  np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
  scaling = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
  plain = rope_frequencies(dataclasses.replace(TINY, head_dim=64))
  scaled = rope_frequencies(dataclasses.replace(TINY, head_dim=64, rope_scaling=scaling))
  turns = 64 * plain / (2 * np.pi)
  np.testing.assert_array_equal(scaled[turns >= 4], plain[turns >= 4])
  np.testing.assert_array_equal(scaled[turns <= 1], plain[turns <= 1] / 8)
  between = (turns > 1) & (turns < 4)
  assert between.any() and (scaled < plain)[between].all() and (scaled > plain / 8)[between].all()


def test_write_drops_what_lies_beyond_the_buffer():
  buffer, new = jnp.zeros((2, 4, 1, 1)), jnp.arange(1.0, 7.0).reshape(2, 3, 1, 1)
  written = write(buffer, new, jnp.array([1, 3], jnp.int32))[..., 0, 0]
  np.testing.assert_array_equal(written, [[0, 1, 2, 3], [0, 0, 0, 4]])


def filled_cache():
  return jax.tree.map(lambda a: jnp.arange(a.size, dtype=a.dtype).reshape(a.shape), KVCache.empty(TINY, 3, 5))


@pytest.mark.parametrize("row", [None, 2])
def test_a_view_of_a_cache_is_read_and_written_where_it_is(row):
  cache = filled_cache()
  view = cache.view(4, None if row is None else jnp.int32(row))
  rows = slice(None) if row is None else slice(row, row + 1)
  batch = 3 if row is None else 1
  new = jnp.full((batch, 3, 2, 8), -1, jnp.bfloat16)
  for whole, part in zip(cache.keys, view.keys, strict=True):
    np.testing.assert_array_equal(read(part), whole[rows, :4])
    written = write(part, new, jnp.full(batch, 2))  # a token beyond the view's four positions is dropped
    np.testing.assert_array_equal(written.buffer, whole.at[rows, 2:4].set(-1))
    np.testing.assert_array_equal(read(written), written.buffer[rows, :4])
  for ours, theirs in zip(jax.tree.leaves(view.whole()), jax.tree.leaves(cache), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_a_token_beyond_the_cache_stays_finite():
  model = tiny(sliding_windows=(2, 2))
  hidden, _ = model.hidden(jnp.ones((1, 8), jnp.int32), jnp.array([2]), KVCache.empty(model.config, 1, 4, jnp.float32))
  assert np.isfinite(hidden).all()


def test_a_cache_of_one_layer_too_few_is_refused():
  model = tiny()
  cache = KVCache.empty(dataclasses.replace(TINY, num_layers=1, sliding_windows=()), 1, 4, jnp.float32)
  with pytest.raises(ValueError, match="shorter"):
    model.hidden(jnp.ones((1, 1), jnp.int32), jnp.array([0]), cache)


@pytest.fixture
def interpreted(monkeypatch):
  """What is between the products takes its kernels, in the interpreter; returns the names of those called."""
  monkeypatch.setattr(decoder, "unsupported_reason", lambda *_: None)
  called = []

  def interpret(module, name):
    kernel = getattr(module, name)

    def call(*args, **options):
      called.append(name)
      return kernel(*args, interpret=True, **options)

    monkeypatch.setattr(module, name, call)

  for module, name in ((layers, "decode_attention"), (layers, "prompt_attention"), (residual, "add_norm_kernel")):
    interpret(module, name)
  return called


@pytest.mark.parametrize(
  ("tokens", "start", "attention"),
  [
    ([[8], [6]], [5, 3], "decode_attention"),
    ([[3, 9, 4, 1, 5], [7, 7, 2, 0, 0]], [0, 0], "prompt_attention"),
    ([[3, 9, 4, 1, 5], [7, 7, 2, 0, 0]], [5, 3], "prompt_attention"),
  ],
)
def test_the_kernels_between_products_give_what_the_plain_layers_give(request, tokens, start, attention):
  config = dataclasses.replace(TINY, num_layers=1, hidden_size=32, head_dim=32, qk_norm=True, sliding_windows=(4,))
  model = Decoder(config, rngs=nnx.Rngs(0))
  prompt = jnp.array([[2, 1, 8, 11, 30], [6, 6, 5, 0, 0]], jnp.int32)
  tokens, start = jnp.array(tokens, jnp.int32), jnp.array(start, jnp.int32)
  _, cache = hidden_of(*nnx.split(model), prompt, jnp.zeros(2, jnp.int32), KVCache.empty(config, 2, 16))
  expected, expected_cache = hidden_of(*nnx.split(model), tokens, start, cache)
  called = request.getfixturevalue("interpreted")
  result, cache = jax.jit(lambda *arguments: model.hidden(*arguments))(tokens, start, cache)
  # The norms after attention and MLP; the first norm has nothing to add.
  assert called == [attention, "add_norm_kernel", "add_norm_kernel"]
  np.testing.assert_allclose(result.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.05, atol=0.05)
  for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(expected_cache), strict=True):
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=0.05, atol=0.05)


def test_the_kernels_write_and_read_one_row_of_a_cache_where_it_is(interpreted):
  model = Decoder(dataclasses.replace(TINY, head_dim=32), rngs=nnx.Rngs(0))
  before = KVCache.empty(model.config, 3, 16)
  before = jax.tree.map(lambda buffer: jnp.full_like(buffer, 7), before)
  tokens = jnp.arange(5)[None]
  row, start = jnp.array(1, jnp.int32), jnp.zeros(1, jnp.int32)
  alone, small = jax.jit(lambda cache: model.hidden(tokens, start, cache))(KVCache.empty(model.config, 1, 8))
  hidden, view = jax.jit(lambda cache: model.hidden(tokens, start, cache.view(8, row)))(before)
  assert "prompt_attention" in interpreted
  np.testing.assert_array_equal(hidden, alone)
  for whole, of_row in zip(jax.tree.leaves(view.whole()), jax.tree.leaves(small), strict=True):
    np.testing.assert_array_equal(whole[1, :5], of_row[0, :5])
    np.testing.assert_array_equal(whole.at[1, :5].set(7), 7)


def test_on_an_h200_a_prompt_and_a_decode_step_take_the_kernels(lower_for_h200):
  model = Decoder(dataclasses.replace(TINY, head_dim=32), rngs=nnx.Rngs(0))
  graphdef, weights = nnx.split(model)
  cache, start = KVCache.empty(model.config, 2, 16), jnp.zeros(2, jnp.int32)

  def kernels(tokens):
    def step(weights):
      return nnx.merge(graphdef, weights).hidden(jnp.zeros((2, tokens), jnp.int32), start, cache)

    text = lower_for_h200(step, weights)
    assert "__gpu$xla.gpu.triton" in text
    return [name for name in ("decode_attention", "prompt_attention", "add_norm") if f"call @{name}(" in text]

  assert kernels(tokens=1) == ["decode_attention", "add_norm"]
  assert kernels(tokens=2) == ["prompt_attention", "add_norm"]
