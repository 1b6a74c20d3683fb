# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax.generation import scoring
from marlin_jax.generation.scoring import perplexity

forward = nnx.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def tokens(model):
  return np.random.default_rng(3).integers(0, model.config.vocab_size, 75, dtype=np.uint16)


def longhand(model, tokens, window):
  """In float64, one window at a time."""
  scores = []
  for first in range(0, len(tokens) - window + 1, window):
    part = tokens[first : first + window]
    logits = np.asarray(forward(model, np.int32(part)[None]), np.float64)[0]
    for i in range(1, window):
      row = logits[i - 1]
      scores.append(np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[part[i]])
  return float(np.exp(np.mean(scores)))


@pytest.mark.parametrize("window", [2, 16, 75])
def test_perplexity_is_the_longhand_sum(model, tokens, window):
  np.testing.assert_allclose(perplexity(model, tokens, window=window), longhand(model, tokens, window), rtol=1e-5)


def test_batches_and_their_filling_do_not_count(monkeypatch, model, tokens):
  whole = perplexity(model, tokens, window=10)  # 7 windows
  monkeypatch.setattr(scoring, "_TOKENS_PER_BATCH", 40)  # 4 windows, and 3 with one to fill up
  programs = scoring._score._cache_size()
  np.testing.assert_allclose(perplexity(model, tokens, window=10), whole, rtol=1e-6)
  assert scoring._score._cache_size() == programs + 1


def test_the_incomplete_window_and_its_tokens_are_left_out(model, tokens):
  assert perplexity(model, tokens[:69], window=20) == perplexity(model, tokens[:60], window=20)


def test_a_model_without_knowledge_scores_the_vocabulary_size(model, tokens):
  graphdef, weights = nnx.split(model)
  ignorant = nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, weights))
  np.testing.assert_allclose(perplexity(ignorant, tokens, window=10), model.config.vocab_size, rtol=1e-5)


@pytest.mark.parametrize(
  ("count", "window", "bad", "message"),
  [
    (75, 1, 0, r"window=1 must be in 2 \.\. 100"),
    (75, 101, 0, r"window=101 must be in 2 \.\. 100, the model's context"),
    (9, 10, 0, "tokens has 9 token ids, and must fill at least one window of 10"),
    (75, 10, 61, r"tokens has the token id 61, which must be in 0 \.\. 60"),
  ],
)
def test_bad_arguments(model, tokens, count, window, bad, message):
  tokens = tokens[:count].copy()
  tokens[0] = bad
  with pytest.raises(ValueError, match=message):
    perplexity(model, tokens, window=window)
