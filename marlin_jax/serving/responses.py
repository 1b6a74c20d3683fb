# SPDX-License-Identifier: Apache-2.0
"""The answers of the OpenAI API: whole, or chunk by chunk, for completions and for chat."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from marlin_jax.serving.continuation import Piece, TokenText
from marlin_jax.tokenizer import Tokenizer

# Minus infinity is no JSON; a token that cannot be has this log-probability.
_LEAST_LOGPROB = -9999.0


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
  """How many tokens a request took."""
  total = prompt_tokens + completion_tokens
  return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class CompletionFormat:
  """The answers of /v1/completions; one object a request, because its id and time are in every chunk."""

  prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

  def __init__(self, model: str, tokenizer: Tokenizer):
    self._model, self._tokenizer = model, tokenizer
    self._id, self._created = self.prefix + uuid.uuid4().hex, int(time.time())

  def whole(self, choices: Sequence[list[Piece]], usage: dict[str, int]) -> dict[str, Any]:
    """The answer to a request without streaming: the pieces of every choice, joined."""
    joined = [
      Piece("".join(p.text for p in pieces), [t for p in pieces for t in p.tokens], pieces[-1].finish_reason)
      for pieces in choices
    ]
    return self._envelope(self.whole_object, [self.choice(i, piece) for i, piece in enumerate(joined)]) | {
      "usage": usage
    }

  def chunk(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
    """A chunk of one choice, its first or a later one."""
    return self._envelope(self.chunk_object, [self.delta(index, piece, first)])

  def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
    """The last chunk, for those who ask for it."""
    return self._envelope(self.chunk_object, []) | {"usage": usage}

  def choice(self, index: int, piece: Piece) -> dict[str, Any]:
    """One entry of `choices`."""
    return {
      "index": index,
      "text": piece.text,
      "logprobs": self.logprobs(piece.tokens),
      "finish_reason": piece.finish_reason,
    }

  def delta(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
    """One entry of a chunk's `choices`."""
    return self.choice(index, piece)

  def logprobs(self, tokens: list[TokenText]) -> dict[str, Any] | None:
    """Four lists of equal length."""
    if not tokens:
      return None
    return {
      "tokens": [self._text(t.token) for t in tokens],
      "token_logprobs": [_finite(t.logprobs.logprob) for t in tokens],
      "top_logprobs": [
        {
          self._text(token): _finite(logprob)
          for token, logprob in [
            *zip(t.logprobs.top_ids, t.logprobs.top_logprobs, strict=True),
            (t.token, t.logprobs.logprob),
          ]
        }
        for t in tokens
      ],
      "text_offset": [t.offset for t in tokens],
    }

  def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

  def _text(self, token: int) -> str:
    return self._tokenizer.token_bytes(token).decode(errors="replace")


class ChatFormat(CompletionFormat):
  """The answers of /v1/chat/completions."""

  prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

  def choice(self, index: int, piece: Piece) -> dict[str, Any]:
    """One entry of `choices`."""
    return {
      "index": index,
      "message": {"role": "assistant", "content": piece.text, "refusal": None},
      "logprobs": self.logprobs(piece.tokens),
      "finish_reason": piece.finish_reason,
    }

  def delta(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
    """One entry of a chunk's `choices`; the first one says who speaks."""
    delta = ({"role": "assistant"} if first else {}) | {"content": piece.text}
    return {
      "index": index,
      "delta": delta,
      "logprobs": self.logprobs(piece.tokens),
      "finish_reason": piece.finish_reason,
    }

  def logprobs(self, tokens: list[TokenText]) -> dict[str, Any] | None:
    """One entry a token, with its bytes: a token may be a part of a character."""
    if not tokens:
      return None
    content = []
    for t in tokens:
      top = zip(t.logprobs.top_ids, t.logprobs.top_logprobs, strict=True)
      content.append(self._entry(t.token, t.logprobs.logprob) | {"top_logprobs": [self._entry(*pair) for pair in top]})
    return {"content": content, "refusal": None}

  def _entry(self, token: int, logprob: float) -> dict[str, Any]:
    return {
      "token": self._text(token),
      "logprob": _finite(logprob),
      "bytes": list(self._tokenizer.token_bytes(token)),
    }


def _finite(logprob: float) -> float:
  return max(logprob, _LEAST_LOGPROB)
