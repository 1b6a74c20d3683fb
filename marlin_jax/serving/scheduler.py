# SPDX-License-Identifier: Apache-2.0
"""Who is in which slot: one thread that owns JAX, a bounded queue before it, events to the clients behind it.

    submit -> queue -> slot: fill, fill, ... -> decode, decode, ... -> free
                         |  one chunk of a prompt, then one chunk of decode steps for all: a long prompt stalls nobody
    every turn:  cancelled ones leave, waiting ones enter, fill one chunk, decode one chunk

A step that raises fails the requests that were in the slots, with its message; the device's state is made anew and the
thread goes on with the queue. After `max_faults` of them in a row it fails what waits, too, and takes no more.
"""

import collections
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from marlin_jax.generation.sampling import Sampling
from marlin_jax.models.decoder import Decoder
from marlin_jax.serving.engine import Engine, Logprobs, Needs, ServingConfig

_logger = logging.getLogger(__name__)


class QueueFull(Exception):
  """As many requests wait as may wait."""


class Draining(Exception):
  """The scheduler takes no more requests: it is being stopped, or has given up after faults."""


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


class TokenEvent(NamedTuple):
  """What a client is told: new tokens, and at last a finish_reason: "stop", "length", "cancelled" or "error"."""

  tokens: list[int]
  logprobs: list[TokenLogprobs] | None
  finish_reason: str | None
  error: str | None = None


Deliver = Callable[[TokenEvent], None]


class Ticket:
  """A submitted request.

  Attributes:
    slot: where it is decoded; None while it waits.
    filled: tokens of the prompt that are in the slot.
    emitted: tokens that it has got.
  """

  def __init__(self, number: int, request: GenerationRequest, deliver: Deliver):
    self.number, self.request, self.slot, self.filled, self.emitted = number, request, None, 0, 0
    self._deliver, self._cancelled, self._ended = deliver, threading.Event(), False

  def cancel(self) -> None:
    """Frees its slot within a chunk; from any thread, any number of times."""
    self._cancelled.set()

  @property
  def cancelled(self) -> bool:
    """Whether `cancel` was called."""
    return self._cancelled.is_set()

  @property
  def decoding(self) -> bool:
    """Whether all of its prompt is in the slot."""
    return self.filled == len(self.request.prompt)

  def tell(self, event: TokenEvent) -> None:
    """Hands an event over, nothing after the last one. A receiver that raises is told no more."""
    if self._ended:
      return
    self._ended = event.finish_reason is not None
    try:
      self._deliver(event)
    except Exception:
      _logger.exception("the receiver of request %d raised", self.number)
      self._ended = True
      self.cancel()


@dataclasses.dataclass(kw_only=True, slots=True)
class SchedulerStats:
  """Numbers that only grow, and what is now (queued, slots_used, cache_used)."""

  queued: int = 0
  slots_used: int = 0
  cache_used: int = 0  # positions that hold a token of a request
  decode_chunks: int = 0
  decoded_rows: int = 0  # slots that were decoding, summed over the chunks: over decode_chunks it is the mean batch
  recompilations: int = 0
  faults: int = 0


class Scheduler:
  """Runs requests; `submit` may be called from any thread, and everything on the device happens in one.

  Attributes:
    config: the ServingConfig, its context cut to the model's.
    stats: SchedulerStats.
    ready: whether everything is compiled and requests are taken.
  """

  def __init__(self, model: Decoder, config: ServingConfig):
    self._engine = Engine(model, config)
    self.config = self._engine.config
    self.stats = SchedulerStats()
    self.ready = False
    self._work = threading.Condition()
    self._queue: collections.deque[Ticket] = collections.deque()
    self._slots: list[Ticket | None] = [None] * self.config.slots
    self._numbers = itertools.count()
    self._stopping = False
    self._faults_in_a_row = 0
    self._compiled = threading.Event()
    self._failure: Exception | None = None
    self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

  def start(self) -> None:
    """Compiles everything, in the thread that will run it, and returns when `ready`.

    Raises:
      RuntimeError: a program does not compile; with its message.
    """
    self._thread.start()
    self._compiled.wait()
    if self._failure is not None:
      raise RuntimeError(f"the model's programs do not compile: {self._failure}") from self._failure

  def submit(self, request: GenerationRequest, deliver: Deliver) -> Ticket:
    """Puts a request in the queue; `deliver` is called with its events in the scheduler's thread, and must not block.

    Raises:
      ValueError: a token outside the vocabulary, or more of something than the ServingConfig has room for.
      QueueFull: as many wait as may wait.
      Draining: no more requests are taken.
    """
    self._check(request)
    with self._work:
      if self._stopping:
        raise Draining("no more requests are taken")
      if len(self._queue) >= self.config.queue_limit:
        raise QueueFull(f"{len(self._queue)} requests wait already")
      ticket = Ticket(next(self._numbers), request, deliver)
      self._queue.append(ticket)
      self.stats.queued = len(self._queue)
      self._work.notify()
    return ticket

  def drain(self, timeout: float | int) -> bool:
    """Takes no more requests, finishes those it has, and stops the thread; what is not done in time is failed.

    Args:
      timeout: seconds.

    Returns:
      Whether everything was finished in time.
    """
    with self._work:
      self._stopping = True
      self._work.notify()
    self.ready = False
    self._thread.join(timeout)
    finished = not self._thread.is_alive()
    if not finished:
      for ticket in [*self._tickets(), *self._queue]:
        ticket.tell(TokenEvent([], None, "error", "the server was stopped"))
        ticket.cancel()
      self._thread.join(timeout)
    return finished

  def _check(self, request: GenerationRequest) -> None:
    c = self.config
    length = len(request.prompt) + request.max_new_tokens
    if length > c.context:
      raise ValueError(
        f"the prompt has {len(request.prompt)} tokens and max_new_tokens={request.max_new_tokens}, together {length}, "
        f"which must be at most {c.context}"
      )
    for token in request.prompt:
      if not 0 <= token < self._engine.vocab_size:
        raise ValueError(f"the prompt has the token id {token}, which must be in 0 .. {self._engine.vocab_size - 1}")
    if len(request.eos_token_ids) > c.max_eos:
      raise ValueError(f"eos_token_ids has {len(request.eos_token_ids)} tokens, must have at most {c.max_eos}")
    if request.logprobs is not None and request.logprobs > c.max_logprobs:
      raise ValueError(f"logprobs={request.logprobs} must be at most {c.max_logprobs}")

  def _run(self) -> None:
    try:
      self._engine.compile()
    except Exception as error:
      self._failure, self._stopping = error, True
      self._compiled.set()
      return
    compiled = self._engine.compilations
    self.ready = True
    self._compiled.set()
    while True:
      with self._work:
        while not (self._queue or self._stopping or any(self._slots)):
          self._work.wait()
        if self._stopping and not self._queue and not any(self._slots):
          return
      try:
        self._turn()
        self._faults_in_a_row = 0
      except Exception as error:
        self._fault(error)
      self.stats.recompilations = self._engine.compilations - compiled

  def _turn(self) -> None:
    for ticket in self._tickets():
      if ticket.cancelled:
        self._leave(ticket, TokenEvent([], None, "cancelled"))
    self._enter()
    self._fill()
    if any(ticket.decoding for ticket in self._tickets()):
      self._decode()
    self.stats.slots_used = len(self._tickets())
    self.stats.cache_used = sum(ticket.filled + ticket.emitted for ticket in self._tickets())

  def _tickets(self) -> list[Ticket]:
    return [ticket for ticket in self._slots if ticket is not None]

  def _enter(self) -> None:
    """Waiting requests take free slots, first come, first served."""
    with self._work:
      for slot, holder in enumerate(self._slots):
        while holder is None and self._queue:
          ticket = self._queue.popleft()
          if ticket.cancelled:
            ticket.tell(TokenEvent([], None, "cancelled"))
            continue
          ticket.slot = slot
          self._slots[slot] = holder = ticket
      self.stats.queued = len(self._queue)

  def _leave(self, ticket: Ticket, event: TokenEvent) -> None:
    self._slots[ticket.slot] = None
    self._engine.free([ticket.slot])
    ticket.tell(event)

  def _fill(self) -> None:
    """One chunk of the prompt of the request that has been in a slot longest without being decoded."""
    waiting = [ticket for ticket in self._tickets() if not ticket.decoding]
    if not waiting:
      return
    ticket = min(waiting, key=lambda ticket: ticket.number)
    request, start = ticket.request, ticket.filled
    tokens = list(request.prompt[start : start + self.config.prefill_chunk])
    ticket.filled += len(tokens)
    token, logprobs = self._engine.fill(
      ticket.slot,
      tokens,
      start,
      last=ticket.decoding,
      sampling=request.sampling,
      eos_token_ids=request.eos_token_ids,
    )
    if ticket.decoding:
      self._emit(ticket, [int(token)], [logprobs] if request.logprobs is not None else None)

  def _decode(self) -> None:
    rows = [ticket for ticket in self._tickets() if ticket.decoding]
    needs = Needs(
      draws=any(not ticket.request.sampling.greedy for ticket in rows),
      cuts=any(ticket.request.sampling.cuts for ticket in rows),
      logprobs=any(ticket.request.logprobs is not None for ticket in rows),
    )
    # The host waits for the tokens before it decides who leaves and who enters; what it does meanwhile costs the device
    # a millisecond a chunk. A chunk begun before the last one is looked at would hide that, and give every request that
    # ends a chunk of useless steps.
    tokens, counts, logprobs = self._engine.decode(needs)
    tokens, counts = np.asarray(tokens), np.asarray(counts)
    if logprobs is not None:
      logprobs = Logprobs(*(np.asarray(array) for array in logprobs))
    self.stats.decode_chunks += 1
    self.stats.decoded_rows += len(rows)
    for ticket in rows:
      slot, count = ticket.slot, int(counts[ticket.slot])
      of_tokens = None
      if ticket.request.logprobs is not None:
        of_tokens = [Logprobs(*(array[slot, i] for array in logprobs)) for i in range(count)]
      self._emit(ticket, tokens[slot, :count].tolist(), of_tokens)

  def _emit(self, ticket: Ticket, tokens: list[int], logprobs: list[Logprobs] | None) -> None:
    """Hands new tokens to the client, no more than it asked for, and frees the slot after the last."""
    request = ticket.request
    tokens = tokens[: request.max_new_tokens - ticket.emitted]
    ticket.emitted += len(tokens)
    reason = None
    if tokens and tokens[-1] in request.eos_token_ids:
      reason = "stop"
    elif ticket.emitted == request.max_new_tokens:
      reason = "length"
    said = None
    if logprobs is not None:
      said = [
        TokenLogprobs(
          float(l.chosen),
          np.asarray(l.top_tokens)[: request.logprobs].tolist(),
          np.asarray(l.top)[: request.logprobs].tolist(),
        )
        for l in logprobs[: len(tokens)]
      ]
    event = TokenEvent(tokens, said, reason)
    if reason is None:
      ticket.tell(event)
    else:
      self._leave(ticket, event)

  def _fault(self, error: Exception) -> None:
    _logger.exception("a step failed")
    self.stats.faults += 1
    self._faults_in_a_row += 1
    failed, self._slots = self._tickets(), [None] * self.config.slots
    message = f"a step of the model failed: {type(error).__name__}: {error}"
    with self._work:
      if self._faults_in_a_row >= self.config.max_faults:
        self._stopping, self.ready = True, False
        failed += self._queue
        self._queue.clear()
      self.stats.queued = len(self._queue)
    for ticket in failed:
      ticket.tell(TokenEvent([], None, "error", message))
    self._engine.reset()
