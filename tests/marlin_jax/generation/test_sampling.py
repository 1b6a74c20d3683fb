# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from marlin_jax.generation.sampling import GREEDY, Sampling, penalize_repetition, sample

ROWS, VOCAB = 8, 33

compiled_sample = jax.jit(sample)


def keys_for(rows, seed=0):
  return jax.random.split(jax.random.key(seed), rows)


def draw(logits, sampling, seed=0, seen=None):
  logits = jnp.asarray(logits, jnp.float32)
  seen = jnp.zeros(logits.shape, bool) if seen is None else jnp.asarray(seen)
  return np.asarray(compiled_sample(logits, seen, keys_for(len(logits), seed), sampling.arrays()))


def frequencies(probabilities, sampling, draws=4096):
  """How often each token comes when one row of log-probabilities is sampled `draws` times."""
  logits = np.tile(np.log(np.asarray(probabilities, np.float32)), (draws, 1))
  return np.bincount(draw(logits, sampling), minlength=len(probabilities)) / draws


@pytest.fixture
def logits():
  return jax.random.normal(jax.random.key(7), (ROWS, VOCAB)) * 30


def test_greedy_takes_the_largest_logit_and_the_lowest_id_of_a_tie():
  np.testing.assert_array_equal(draw([[0, 2, 1], [5, 1, 5], [-3, -1, -2]], GREEDY), [1, 0, 1])


@pytest.mark.parametrize(
  "sampling",
  [
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=5.0, top_k=1),
    Sampling(temperature=1e-6),
    Sampling(temperature=2e-38),
    Sampling(temperature=1e-42),
    Sampling(temperature=1e-6, top_k=5, top_p=0.9),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1.0, top_p=1e-60),
  ],
  ids=str,
)
def test_limits_are_greedy(logits, sampling):
  for seed in range(4):
    np.testing.assert_array_equal(draw(logits, sampling, seed), np.argmax(logits, axis=-1))


def test_a_top_k_beyond_the_vocabulary_cuts_nothing(logits):
  for top_k in (VOCAB, 2**40):
    expected = draw(logits / 30, Sampling(temperature=1.0))
    np.testing.assert_array_equal(draw(logits / 30, Sampling(temperature=1.0, top_k=top_k)), expected)


def test_top_1_breaks_ties_as_greedy_does():
  tied = np.tile(np.float32([1, 4, 4, 4, 0]), (16, 1))
  np.testing.assert_array_equal(draw(tied, Sampling(temperature=1.0, top_k=1)), np.full(16, 1))


def test_top_k_draws_all_of_the_k_most_likely_tokens_and_no_other():
  observed = frequencies([0.1, 0.2, 0.05, 0.3, 0.15, 0.2], Sampling(temperature=1.0, top_k=3))
  assert set(np.flatnonzero(observed)) == {1, 3, 5}


@pytest.mark.parametrize(
  ("top_p", "kept"),
  [
    (0.49, {2}),
    (0.5, {2}),  # exactly reached: the set does not grow
    (0.51, {0, 2}),
    (0.75, {0, 2}),
    (0.76, {0, 2, 3}),
    (0.875, {0, 2, 3}),
    (0.99, {0, 1, 2, 3}),
    (1.0, {0, 1, 2, 3}),
  ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
  observed = frequencies([0.25, 0.125, 0.5, 0.125], Sampling(temperature=1.0, top_p=top_p))
  # Tokens 1 and 3 tie; of the two the lower id is kept first.
  assert set(np.flatnonzero(observed)) == ({0, 1, 2} if kept == {0, 2, 3} else kept)


def test_top_p_counts_the_mass_that_top_k_left():
  # top_k=2 leaves 4/7 and 3/7: the first alone reaches 0.55, which its 0.4 of the whole would not.
  observed = frequencies([0.4, 0.3, 0.2, 0.1], Sampling(temperature=1.0, top_k=2, top_p=0.55))
  assert set(np.flatnonzero(observed)) == {0}


@pytest.mark.parametrize(
  ("sampling", "expected"),
  [
    (Sampling(temperature=1.0), [0.4, 0.3, 0.2, 0.1]),
    (Sampling(temperature=0.5), np.array([16, 9, 4, 1]) / 30),
    (Sampling(temperature=1.0, top_k=3), np.array([4, 3, 2, 0]) / 9),
    (Sampling(temperature=1.0, top_p=0.65), np.array([4, 3, 0, 0]) / 7),
    (Sampling(temperature=0.5, top_k=3, top_p=0.99), np.array([16, 9, 4, 0]) / 29),
  ],
  ids=str,
)
def test_frequencies_are_those_of_the_distribution(sampling, expected):
  draws = 4096
  observed = frequencies([0.4, 0.3, 0.2, 0.1], sampling, draws)
  possible = np.asarray(expected) > 0
  assert not observed[~possible].any()
  chi_square = draws * np.sum((observed - expected)[possible] ** 2 / np.asarray(expected)[possible])
  # The 99.9 % point of chi-square with 3 degrees of freedom.
  assert chi_square < 16.3


def test_a_row_depends_on_its_own_logits_and_key_only(logits):
  sampling, keys = Sampling(temperature=1.0, top_k=20, top_p=0.95).arrays(), keys_for(ROWS)
  seen = jnp.zeros((ROWS, VOCAB), bool)
  together = compiled_sample(logits, seen, keys, sampling)
  for row in range(ROWS):
    alone = compiled_sample(logits[row : row + 1], seen[:1], keys[row : row + 1], sampling)
    assert alone[0] == together[row]


def test_the_penalty_makes_seen_tokens_less_likely_whatever_the_sign_of_their_logit():
  logits = jnp.asarray([[2.0, 3.0, -1.0, -1.0, 0.0]])
  seen = jnp.asarray([[False, True, True, False, True]])
  np.testing.assert_array_equal(penalize_repetition(logits, seen, np.asarray(2, np.float32)), [[2, 1.5, -2, -1, 0]])
  np.testing.assert_array_equal(penalize_repetition(logits, seen, np.asarray(1, np.float32)), logits)


def test_the_penalty_changes_the_greedy_choice():
  logits, seen = [[2.0, 3.0, 1.0]], [[False, True, False]]
  assert draw(logits, GREEDY, seen=seen) == [1]
  assert draw(logits, Sampling(repetition_penalty=2.0), seen=seen) == [0]


def test_values_of_settings_compile_nothing(logits):
  compiled = jax.jit(lambda *arguments: sample(*arguments))
  seen = jnp.zeros((ROWS, VOCAB), bool)
  for sampling in (
    Sampling(repetition_penalty=1.1),
    Sampling(temperature=0.7),
    Sampling(temperature=1, top_k=3, top_p=0.5, seed=4),
    Sampling(temperature=2, top_p=0.9),
  ):
    compiled(logits, seen, keys_for(ROWS), sampling.arrays())
  assert compiled._cache_size() == 2  # with a cut and without


def test_only_a_cut_sorts():
  for sampling, sorts in ((Sampling(temperature=1.0), False), (Sampling(temperature=1.0, top_k=2), True)):
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((1, VOCAB)), jnp.zeros((1, VOCAB), bool), keys_for(1), sampling.arrays())
    assert ("sort" in str(jaxpr)) == sorts


def test_a_row_with_settings_of_its_own_draws_what_it_draws_alone(logits):
  rows = [
    GREEDY,
    Sampling(temperature=0.8),
    Sampling(temperature=1.5, top_k=4),
    Sampling(temperature=1.0, top_p=0.6, repetition_penalty=1.3),
    Sampling(repetition_penalty=1.5),
  ]
  logits = jnp.asarray(logits)[: len(rows)]
  seen = jnp.arange(VOCAB)[None] % jnp.arange(2, 2 + len(rows))[:, None] == 0
  for draw in range(20):
    keys = jax.random.split(jax.random.key(draw), len(rows))
    alone = [
      int(sample(logits[i : i + 1], seen[i : i + 1], keys[i : i + 1], sampling.arrays())[0])
      for i, sampling in enumerate(rows)
    ]
    settings = jax.tree.map(
      lambda *of_rows: np.stack(of_rows), *(dataclasses.replace(r.arrays(), cuts=True) for r in rows)
    )
    assert sample(logits, seen, keys, settings).tolist() == alone


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ({"temperature": -0.5}, r"temperature=-0\.5 must be at least 0"),
    ({"temperature": float("nan")}, r"temperature=nan must be a finite number"),
    ({"temperature": "hot"}, r"temperature='hot' must be a finite number"),
    ({"top_k": 0}, r"top_k=0 must be at least 1"),
    ({"top_k": 2.0}, r"top_k=2\.0 must be an integer"),
    ({"top_p": 0.0}, r"top_p=0\.0 must be in \(0, 1\]"),
    ({"top_p": 1.5}, r"top_p=1\.5 must be in \(0, 1\]"),
    ({"top_p": None}, r"top_p=None must be a finite number"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0 must be more than 0"),
    ({"seed": -1}, r"seed=-1 must be in 0 \.\. 2\*\*32 - 1"),
    ({"seed": True}, r"seed=True must be an integer"),
  ],
  ids=str,
)
def test_a_bad_setting_is_refused_by_name(monkeypatch, setting, message):
  # Users run without the type checker of the tests, so wrong types must reach our own message.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=message):
    Sampling(**setting)
