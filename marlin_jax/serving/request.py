# SPDX-License-Identifier: Apache-2.0
"""What is asked of the scheduler, what it answers, and the ticket that stands for a request between the two."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from marlin_jax.generation.sampling import Sampling

_logger = logging.getLogger(__name__)


class QueueFull(Exception):
  """As many requests wait as may wait."""


class Draining(Exception):
  """No more requests are taken: the scheduler is being stopped, or has given up after faults."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
  """What is to be generated.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: how many tokens may come.
    sampling: how they are chosen; the same request gives the same tokens whatever else runs.
    eos_token_ids: the first of these ends it, and is the last token.
    logprobs: how many of the most likely tokens are reported beside each chosen one; None reports nothing.
  """

  prompt: tuple[int, ...]
  max_new_tokens: int
  sampling: Sampling = Sampling()
  eos_token_ids: tuple[int, ...] = ()
  logprobs: int | None = None

  def __post_init__(self):
    if not self.prompt:
      raise ValueError("prompt is empty: it must hold at least one token")
    if self.max_new_tokens < 1:
      raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
    if self.logprobs is not None and self.logprobs < 0:
      raise ValueError(f"logprobs={self.logprobs} must be at least 0, or None")


class TokenLogprobs(NamedTuple):
  """Natural logarithms of the probabilities that the model itself gives, before temperature and cuts."""

  logprob: float
  top_ids: list[int]
  top_logprobs: list[float]


class Timing(NamedTuple):
  """Seconds from `submit` until it had a slot, until its first token (None: there was none), and until its end."""

  queued: float | None
  first_token: float | None
  total: float


class TokenEvent(NamedTuple):
  """What a client is told: new tokens, and at last a finish_reason and the timing.

  The reason is "stop" (an EOS token came, or the client found a stop string), "length", "cancelled" or "error".
  """

  tokens: list[int]
  logprobs: list[TokenLogprobs] | None
  finish_reason: str | None
  error: str | None = None
  timing: Timing | None = None


class Ticket:
  """A submitted request; all but `cancel` belongs to the scheduler's thread.

  Attributes:
    request: the GenerationRequest.
    slot: where it is decoded; None while it waits.
    filled: tokens of the prompt that are in the slot.
    emitted: tokens that it has got.
    begun: tokens that it has got or that the device computes.
    ended: whether it was told its end.
  """

  def __init__(self, request: GenerationRequest, deliver: Callable[[TokenEvent], None]):
    self.request, self.slot, self.ended = request, None, False
    self.filled = self.emitted = self.begun = 0
    self._deliver = deliver
    self._cancel_reason: str | None = None
    self._cancel_lock = threading.Lock()
    self._submitted = time.perf_counter()
    self._entered: float | None = None
    self._first_token: float | None = None

  def cancel(self, reason: str = "cancelled") -> None:
    """Ends it within a chunk and frees its slot; from any thread, any number of times; the first reason stays."""
    with self._cancel_lock:
      self._cancel_reason = self._cancel_reason or reason

  @property
  def cancelled(self) -> str | None:
    """The reason given to `cancel`, or None."""
    return self._cancel_reason

  @property
  def decoding(self) -> bool:
    """Whether all of its prompt is in the slot."""
    return self.filled == len(self.request.prompt)

  def enter(self, slot: int) -> None:
    """It has a slot now."""
    self.slot, self._entered = slot, time.perf_counter()

  def tell(
    self,
    tokens: list[int],
    logprobs: list[TokenLogprobs] | None = None,
    *,
    finish_reason: str | None = None,
    error: str | None = None,
  ) -> None:
    """Hands an event over, nothing after the last one. A receiver that raises is told no more."""
    if self.ended:
      return
    now = time.perf_counter()
    self.ended = finish_reason is not None
    self.emitted += len(tokens)
    if tokens and self._first_token is None:
      self._first_token = now
    timing = None
    if self.ended:
      entered, first = (None if at is None else at - self._submitted for at in (self._entered, self._first_token))
      timing = Timing(entered, first, now - self._submitted)
    try:
      self._deliver(TokenEvent(tokens, logprobs, finish_reason, error, timing))
    except Exception:
      _logger.exception("the receiver of a request raised")
      self.ended = True
      self.cancel()
