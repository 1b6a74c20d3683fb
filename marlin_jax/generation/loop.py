# SPDX-License-Identifier: Apache-2.0
"""Prompts of token ids in, chunks of new token ids out: two compiled programs and a short loop on the host.

    prompts, right-padded to a bucket -> prefill -> first token -> decode chunk -> decode chunk -> ...
                                            |                       ^      |        ^
                                            +------ DecodeState ----+      +--------+   donated: updated in place

All that a shape depends on is rounded up to a power of two, and all that a user sets is a traced argument: a new prompt
in the same buckets, another seed or another temperature compiles nothing.
"""

from collections.abc import Iterator, Sequence
from numbers import Integral

import numpy as np

from marlin_jax.generation.programs import Choice, compile_ahead, decode, prefill
from marlin_jax.generation.sampling import GREEDY, Sampling
from marlin_jax.generation.weights import split
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.fuse import fuse

_SMALLEST_BUCKET = 16
_FEWEST_EOS = 4


def generate_tokens(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  eos_token_ids: Sequence[int] = (),
  chunk: int = 8,
) -> Iterator[list[list[int]]]:
  """Yields the new tokens of every row: the first after prefill, then up to `chunk` tokens a row at a time.

  Row i's lists, joined, are the continuation of `prompts[i]`: at most `max_new_tokens` token ids, the last of them an
  EOS token if one came. A row that is done yields empty lists until all rows are done. What row i yields depends on its
  prompt, its number i and the settings, not on the other rows.

  Args:
    model: a Decoder, float or quantized. Its projections are fused in place first (models/fuse.py).
    prompts: token ids, one sequence a row, of any lengths.
    max_new_tokens: how many tokens a row may get.
    sampling: how a token is chosen.
    eos_token_ids: a row ends with the first of these that it emits.
    chunk: tokens a row between two yields; another value compiles another program.

  Raises:
    ValueError: at the call, not at the first `next`: no prompt, an empty one, one longer than the context allows, a
      token id outside the vocabulary, `max_new_tokens` or `chunk` below 1.
  """
  config = model.config
  for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk)):
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
      raise ValueError(f"{name}={value!r} must be an integer, at least 1")
  if not isinstance(sampling, Sampling):
    raise ValueError(f"sampling={sampling!r} must be a marlin_jax.generation.sampling.Sampling")
  rows = _checked_prompts(prompts, config.vocab_size)
  longest = max(len(row) for row in rows)
  context = config.max_position_embeddings
  if longest + max_new_tokens > context:
    raise ValueError(
      f"prompts[{[len(row) for row in rows].index(longest)}] has {longest} tokens and {max_new_tokens=}, together "
      f"{longest + max_new_tokens}, which must be at most {context}, the model's context (max_position_embeddings)"
    )
  width = min(_bucket(longest, _SMALLEST_BUCKET), context)
  tokens = np.zeros((_bucket(len(rows), 1), width), np.int32)
  lengths = np.zeros(tokens.shape[0], np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
    lengths[i] = len(row)
  eos = np.full(_bucket(len(eos_token_ids), _FEWEST_EOS), -1, np.int32)  # -1 is no token
  eos[: len(eos_token_ids)] = eos_token_ids
  choice = Choice(settings=None if sampling.greedy else sampling.arrays(), eos=eos)
  cache_length = min(_bucket(width + max_new_tokens, _SMALLEST_BUCKET), context)

  def chunks() -> Iterator[list[list[int]]]:
    structure, weights = split(fuse(model))
    arguments = (structure, weights, tokens, lengths, np.uint32(sampling.seed), choice)
    compiling = None
    if max_new_tokens > 1:
      compiling = compile_ahead(*arguments, cache_length=cache_length, chunk=chunk)
    state = prefill(*arguments, cache_length=cache_length)
    ended = np.asarray(state.done)
    yield [[token] for token in np.asarray(state.token)[: len(rows)].tolist()]
    remaining, begun = max_new_tokens - 1, None
    while remaining > 0 and not ended.all():
      if compiling is not None:
        compiling.result()
      state, emitted, counts = begun or decode(structure, weights, state, choice, chunk=chunk)
      # Begun before this chunk is waited for and handed out, so that the device does not wait for the host. It is of no
      # use where all rows turn out to have ended, which costs a chunk at the end.
      begun = decode(structure, weights, state, choice, chunk=chunk) if remaining > chunk else None
      emitted, counts = np.asarray(emitted), np.asarray(counts)
      ended = (counts < chunk) | np.isin(emitted[:, -1], eos)
      counts = np.minimum(counts, remaining)
      remaining -= chunk
      yield [row[:count] for row, count in zip(emitted.tolist(), counts.tolist(), strict=True)][: len(rows)]

  return chunks()


def _bucket(size: int, smallest: int) -> int:
  """The smallest power of two that is at least `size` and `smallest`."""
  return max(smallest, 1 << (size - 1).bit_length())


def _checked_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[np.ndarray]:
  if isinstance(prompts, str) or not isinstance(prompts, Sequence):
    raise ValueError(f"prompts={prompts!r} must be a list of prompts, each a list of token ids")
  if not prompts:
    raise ValueError("prompts is empty: there must be at least one prompt")
  rows = []
  for i, prompt in enumerate(prompts):
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
      raise ValueError(f"prompts[{i}]={prompt!r} must be a list of token ids")
    if len(prompt) == 0:
      raise ValueError(f"prompts[{i}] is empty: it must hold at least one token")
    for token in prompt:
      if not isinstance(token, Integral) or not 0 <= token < vocab_size:
        raise ValueError(f"prompts[{i}] has the token id {token!r}, which must be an integer in 0 .. {vocab_size - 1}")
    rows.append(np.asarray(prompt, np.int32))
  return rows
