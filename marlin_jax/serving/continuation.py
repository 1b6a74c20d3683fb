# SPDX-License-Identifier: Apache-2.0
"""From the tokens of one continuation to text that may be sent: no half character, and nothing of a stop string.

tokens -> TextStream -> characters -> StopStrings -> text to send
                                          |  a tail that may become a stop string is held back
"""

from collections.abc import Sequence
from typing import NamedTuple

from marlin_jax.serving.request import TokenEvent, TokenLogprobs
from marlin_jax.tokenizer import TextStream


class StopStrings:
  """Passes text on up to the first stop string.

  The first is the one whose last character comes first; of two that end together it is the longer. So the joined pieces
  depend on the text alone, and not on how it was cut into pieces.

  Attributes:
    found: whether a stop string came; nothing is passed on after it.
  """

  def __init__(self, stop: Sequence[str]):
    self._stop, self._held, self.found = tuple(stop), "", False

  def add(self, text: str) -> str:
    """What may be sent after this further text."""
    if self.found:
      return ""
    text, self._held = self._held + text, ""
    ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
    if ends:
      self.found = True
      return text[: min(ends)[1]]
    longest = max(map(len, self._stop), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    held = next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
    if held:
      text, self._held = text[:-held], text[-held:]
    return text

  def finish(self) -> str:
    """What was held back and has become no stop string."""
    held, self._held = self._held, ""
    return held


class TokenText(NamedTuple):
  """A token of the text that was sent, the place in the text where it begins, and its log-probabilities."""

  token: int
  offset: int
  logprobs: TokenLogprobs


class Piece(NamedTuple):
  """Further text, the tokens that are complete with it (none if no log-probabilities were asked for), and the end."""

  text: str
  tokens: list[TokenText]
  finish_reason: str | None


class Continuation:
  """One continuation's text: the joined texts of `take` are what one decode of all tokens gives, up to a stop string.

  Attributes:
    token_count: tokens so far, up to the one that ended it.
    ended: whether `take` has returned a finish_reason.
  """

  def __init__(self, stream: TextStream, stop: Sequence[str], eos_token_ids: Sequence[int]):
    """`stream` has taken the prompt already: a word is written with a space after its neighbour only."""
    self._stream, self._stop, self._eos = stream, StopStrings(stop), frozenset(eos_token_ids)
    self.token_count, self.ended = 0, False
    self._decoded = self._sent = 0  # characters
    self._unfinished: list[tuple[int, int, TokenLogprobs]] = []  # tokens whose text has not come: token, offset
    self._finished: list[tuple[int, TokenText]] = []  # tokens whose text has not been sent: where it ends

  def take(self, event: TokenEvent) -> Piece:
    """The Piece that an event completes; a stop string ends it before the scheduler does."""
    text = ""
    for i, token in enumerate(event.tokens):
      self.token_count += 1
      if token in self._eos:
        continue  # the text ends before it
      if event.logprobs is not None:
        self._unfinished.append((token, self._decoded, event.logprobs[i]))
      text += self._pass(self._stream.add([token]))
      if self._stop.found:
        break
    if event.finish_reason is not None and not self._stop.found:
      text += self._pass(self._stream.finish(), last=True)
    self._sent += len(text)
    done = [entry for end, entry in self._finished if end <= self._sent]
    self._finished = [(end, entry) for end, entry in self._finished if end > self._sent]
    reason = "stop" if self._stop.found else event.finish_reason
    self.ended = reason is not None
    return Piece(text, done, reason)

  def _pass(self, decoded: str, *, last: bool = False) -> str:
    self._decoded += len(decoded)
    if decoded or last:
      self._finished += [(self._decoded, TokenText(*entry)) for entry in self._unfinished]
      self._unfinished = []
    text = self._stop.add(decoded)
    return text + self._stop.finish() if last else text
