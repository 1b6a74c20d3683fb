# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: the model's tokenizer around the generation loop."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar, cast

from marlin_jax.generation.loop import generate_tokens
from marlin_jax.generation.sampling import Sampling
from marlin_jax.models.decoder import Decoder

Prompts = TypeVar("Prompts", str, list[str], list[list[int]])


def generate(
  model: Decoder,
  prompts: Prompts,
  *,
  max_new_tokens: int = 64,
  temperature: float | int = 0.0,
  top_k: int | None = None,
  top_p: float | int = 1.0,
  repetition_penalty: float | int = 1.0,
  seed: int = 0,
) -> Prompts:
  """Continues every prompt until the model ends the text or `max_new_tokens` are there; returns the continuations.

  A string gives a string, a list of strings a list of strings, a list of token id lists a list of token id lists. The
  prompt is not part of what comes back. Text ends before the EOS token, token ids end with it.

  Args:
    model: a Decoder from `load_model`, float or quantized. For speed, its query, key and value projections are made one
      layer in place, and so are gate and up; `save_model` still writes them apart.
    prompts: one prompt or a batch; prompts of different lengths run together.
    max_new_tokens: how many tokens a row may get.
    temperature, top_k, top_p, repetition_penalty, seed: how a token is chosen, as in `Sampling`; greedy by default.

  Raises:
    ValueError: an empty prompt, a prompt that with `max_new_tokens` is longer than the model's context, a token id
      outside the vocabulary, a setting out of range, or text for a model without a tokenizer.
  """
  settings: dict[str, Any] = {
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
    "repetition_penalty": repetition_penalty,
    "seed": seed,
  }
  if _is_text(prompts):
    texts = [""] * (1 if isinstance(prompts, str) else len(prompts))
    for row, text in stream(model, cast(list[str], prompts), max_new_tokens=max_new_tokens, **settings):
      texts[row] += text
    return cast(Prompts, texts[0] if isinstance(prompts, str) else texts)
  chunks = generate_tokens(
    model,
    cast(list[list[int]], prompts),
    max_new_tokens=max_new_tokens,
    sampling=Sampling(**settings),
    eos_token_ids=model.config.eos_token_ids,
  )
  return cast(Prompts, [list(chain.from_iterable(row)) for row in zip(*chunks, strict=True)])


def stream(
  model: Decoder,
  prompts: str | list[str],
  *,
  max_new_tokens: int = 64,
  temperature: float | int = 0.0,
  top_k: int | None = None,
  top_p: float | int = 1.0,
  repetition_penalty: float | int = 1.0,
  seed: int = 0,
) -> Iterator[tuple[int, str]]:
  """Yields (row, further text) as it is generated; a row's texts, joined, are what `generate` returns for it.

  A single string is row 0. The arguments are those of `generate`, and so are the errors, which come at the call and not
  at the first `next`. For token ids there is `marlin_jax.generation.loop.generate_tokens`.
  """
  if not _is_text(prompts):
    raise ValueError(f"prompts={prompts!r} must be a string or a list of strings")
  texts = [prompts] if isinstance(prompts, str) else prompts
  for i, text in enumerate(texts):
    if not text:
      raise ValueError(f"prompts[{i}] is empty: it must hold at least one character")
  tokenizer = model.tokenizer
  if tokenizer is None:
    raise ValueError(
      "model.tokenizer is None, so prompts must be lists of token ids; load_model sets it where the checkpoint has one"
    )
  token_ids = [tokenizer.encode(text) for text in texts]
  eos_token_ids = model.config.eos_token_ids
  sampling = Sampling(
    temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
  )
  chunks = generate_tokens(
    model, token_ids, max_new_tokens=max_new_tokens, sampling=sampling, eos_token_ids=eos_token_ids
  )

  def deltas() -> Iterator[tuple[int, str]]:
    decoders = [tokenizer.stream() for _ in texts]
    # A continuation is decoded after its prompt: many tokenizers drop the space before the first word they decode.
    for decoder, prompt in zip(decoders, token_ids, strict=True):
      decoder.add(prompt)
    for chunk in chunks:
      for row, tokens in enumerate(chunk):
        text = decoders[row].add(token for token in tokens if token not in eos_token_ids)
        if text:
          yield row, text
    for row, decoder in enumerate(decoders):
      text = decoder.finish()
      if text:
        yield row, text

  return deltas()


def _is_text(prompts: object) -> bool:
  return isinstance(prompts, str) or (
    isinstance(prompts, Sequence) and len(prompts) > 0 and all(isinstance(prompt, str) for prompt in prompts)
  )
