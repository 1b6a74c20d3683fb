# SPDX-License-Identifier: Apache-2.0
"""Perplexity on held-out tokens: how much of a model's knowledge survives quantization."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Integer

from marlin_jax.generation.weights import Structure, split
from marlin_jax.models.decoder import Decoder

# A program works through about this many tokens: enough rows to keep a device busy, few enough for their logits to fit.
_TOKENS_PER_BATCH = 4096


@partial(jax.jit, static_argnames="structure")
def _score(structure: Structure, weights: list[Array], windows: Int32[Array, "B W"]) -> Float32[Array, " B"]:
  """nll[b] = -sum_{i >= 1} log p(windows[b, i] | windows[b, :i])."""
  logits = structure.merge(weights)(windows)[:, :-1]
  targets = jnp.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
  return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - targets, axis=-1)


def perplexity(model: Decoder, tokens: Integer[np.ndarray, " N"], *, window: int) -> float:
  """exp(mean of -log p(token | the tokens before it in its window)).

  `tokens` are cut into N // window windows that do not overlap. In each window every token but the first is scored,
  given the tokens before it in the same window; the first is context only. Tokens after the last full window are not
  used. So (N // window) * (window - 1) tokens count, all alike. (The convention of the quantization literature, for
  instance GPTQ, Frantar et al., arXiv 2210.17323.)

  Args:
    model: a Decoder, float or quantized.
    tokens: held-out token ids.
    window: tokens in a window.

  Raises:
    ValueError: `window` is below 2 or longer than the model's context, `tokens` do not fill one window, or a token id
      is outside the vocabulary.
  """
  context, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
  if not 2 <= window <= context:
    raise ValueError(f"{window=} must be in 2 .. {context}, the model's context")
  if len(tokens) < window:
    raise ValueError(f"tokens has {len(tokens)} token ids, and must fill at least one window of {window}")
  outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
  if len(outside):
    raise ValueError(f"tokens has the token id {outside[0]}, which must be in 0 .. {vocab_size - 1}")
  count = len(tokens) // window
  windows = tokens[: count * window].reshape(count, window).astype(np.int32)
  batch = min(count, max(1, _TOKENS_PER_BATCH // window))
  structure, weights = split(model)
  total = 0.0
  for first in range(0, count, batch):
    rows = windows[first : first + batch]
    # The last batch is filled up with copies of a window, so that one program scores all of them.
    filled = np.concatenate([rows, np.repeat(rows[:1], batch - len(rows), axis=0)])
    scores = np.asarray(_score(structure, weights, filled))
    total += scores[: len(rows)].sum(dtype=np.float64)
  return math.exp(total / (count * (window - 1)))
