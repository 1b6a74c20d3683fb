# SPDX-License-Identifier: Apache-2.0
"""Who is in which slot: one thread that owns JAX, a bounded queue before it, events to the clients behind it.

    submit -> queue -> slot: fill, fill, ... -> decode, decode, ... -> free
                         |  one chunk of a prompt, then one chunk of decode steps for all: a long prompt stalls nobody
    every turn:  cancelled ones leave, waiting ones enter, begin to fill a chunk, begin to decode one,
                 and hand out what was begun before it

A step that raises fails the requests that were in the slots, with its message; the device's state is made anew and the
thread goes on with the queue. After `max_faults` of them without a finished request between them, or when the state
cannot be made anew, it gives up: what waits fails, too, and it takes no more.
"""

import collections
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np
from jax.typing import ArrayLike

from marlin_jax.serving.engine import Engine
from marlin_jax.serving.programs import Logprobs, Needs
from marlin_jax.serving.request import Draining, GenerationRequest, QueueFull, Ticket, TokenEvent, TokenLogprobs

_logger = logging.getLogger(__name__)

_ABORT_SECONDS = 5.0  # what a chunk on the device may take when everything is being stopped


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerStats:
  """What is now (queued, slots_used, cache_used), and counts since the start."""

  queued: int
  slots_used: int
  cache_used: int  # positions that hold a token of a request
  decode_chunks: int
  decoded_rows: int  # slots that were decoding, summed over the chunks: over decode_chunks it is the mean batch
  recompilations: int
  faults: int


class Scheduler:
  """Runs requests; `submit` may be called from any thread, and everything on the device happens in one.

  Attributes:
    config, vocab_size: of the engine.
    failure: why it has given up, or None.
  """

  def __init__(self, engine: Engine, on_failure: Callable[[str], object] = lambda failure: None):
    """`on_failure` is called in the scheduler's thread, with the reason, once it has given up."""
    self.config, self.vocab_size = engine.config, engine.vocab_size
    self.failure: str | None = None
    self._engine, self._on_failure = engine, on_failure
    self._work = threading.Condition()
    self._queue: collections.deque[Ticket] = collections.deque()
    self._slots: list[Ticket | None] = [None] * self.config.slots
    self._filling: collections.deque[Ticket] = collections.deque()  # whose turn it is to have a chunk filled
    self._leaving: list[int] = []  # slots that still decode on the device, for nobody
    self._results: collections.deque[Callable[[], None]] = collections.deque()  # each waits for the device, and tells
    self._compiled, self._stopping, self._aborting = threading.Event(), False, False
    self._faults_in_a_row = self._faults = self._decode_chunks = self._decoded_rows = self._recompilations = 0
    self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

  def start(self, *, wait: bool = True) -> None:
    """Compiles everything, in the thread that will run it, and returns when `ready`, or at once without `wait`.

    Raises:
      RuntimeError: a program does not compile; with its message. Without `wait`, `on_failure` is told.
    """
    self._thread.start()
    if wait:
      self._compiled.wait()
      if self.failure is not None:
        raise RuntimeError(self.failure)

  @property
  def ready(self) -> bool:
    """Whether everything is compiled and requests are taken."""
    return self._compiled.is_set() and not self._stopping

  @property
  def alive(self) -> bool:
    """Whether its thread runs."""
    return self._thread.is_alive()

  @property
  def stats(self) -> SchedulerStats:
    """The SchedulerStats of this moment."""
    tickets = self._tickets()
    return SchedulerStats(
      queued=len(self._queue),
      slots_used=len(tickets),
      cache_used=sum(ticket.filled + ticket.emitted for ticket in tickets),
      decode_chunks=self._decode_chunks,
      decoded_rows=self._decoded_rows,
      recompilations=self._recompilations,
      faults=self._faults,
    )

  def submit(self, requests: Sequence[GenerationRequest], deliver: Callable[[int, TokenEvent], object]) -> list[Ticket]:
    """Puts requests in the queue, all of them or none; `deliver` is called with the number of one and its next event.

    That happens in the scheduler's thread, so it must not block.

    Raises:
      ValueError: a token outside the vocabulary, or more of something than the ServingConfig has room for.
      QueueFull: too many wait already.
      Draining: no more requests are taken.
    """
    for request in requests:
      self._check(request)
    c = self.config
    # A free slot is as good as a place in the queue: the thread hands it out at its next turn.
    places = c.slots + c.queue_limit
    if len(requests) > places:
      raise ValueError(f"{len(requests)} requests at once, must be at most {places}")
    with self._work:
      if self._stopping:
        raise Draining(self.failure or "the server is being stopped")
      taken = len(self._queue) + len(self._tickets())
      if taken + len(requests) > places:
        raise QueueFull(f"{max(taken - c.slots, 0)} requests wait already, and {c.queue_limit} may")
      tickets = [Ticket(request, functools.partial(deliver, i)) for i, request in enumerate(requests)]
      self._queue += tickets
      self._work.notify()
    return tickets

  def stop(self) -> None:
    """Takes no more requests; goes on with those it has."""
    with self._work:
      self._stopping = True
      self._work.notify()

  def drain(self, timeout: float | int) -> bool:
    """Takes no more requests, finishes those it has, and stops the thread; what is not done in time is failed.

    Args:
      timeout: seconds.

    Returns:
      Whether everything was finished in time.
    """
    self.stop()
    if self._thread.ident is None:
      self._fail_all("the server was stopped")
      return True
    self._thread.join(timeout)
    if not self._thread.is_alive():
      return not self._aborting
    self.abort()
    self._thread.join(_ABORT_SECONDS)
    return False

  def abort(self) -> None:
    """Takes no more requests, and fails those it has within a chunk."""
    self._aborting = True
    self.stop()

  def _check(self, request: GenerationRequest) -> None:
    c, vocab_size = self.config, self.vocab_size
    length = len(request.prompt) + request.max_new_tokens
    if length > c.context:
      raise ValueError(
        f"the prompt has {len(request.prompt)} tokens and max_new_tokens={request.max_new_tokens}, together {length}, "
        f"which must be at most {c.context}"
      )
    for token in request.prompt:
      if not 0 <= token < vocab_size:
        raise ValueError(f"the prompt has the token id {token}, which must be in 0 .. {vocab_size - 1}")
    if len(request.eos_token_ids) > c.max_eos:
      raise ValueError(f"eos_token_ids has {len(request.eos_token_ids)} tokens, must have at most {c.max_eos}")
    if request.logprobs is not None and request.logprobs > c.max_logprobs:
      raise ValueError(f"logprobs={request.logprobs} must be at most {c.max_logprobs}")

  def _run(self) -> None:
    try:
      self._engine.compile()
      before = self._engine.compilations
      self._compiled.set()
      while self._wait():
        self._step()
        self._recompilations = self._engine.compilations - before
    except Exception as error:
      _logger.exception("the scheduler ends")
      what = "the scheduler failed" if self._compiled.is_set() else "the model's programs do not compile"
      self._give_up(f"{what}: {_one_line(error)}")
    finally:
      self._compiled.set()

  def _wait(self) -> bool:
    """Waits for something to do; whether there will be more."""
    with self._work:
      while not (self._queue or self._stopping or any(self._slots)):
        self._work.wait()
      if not self._aborting:
        return bool(self._queue or any(self._slots))
    self._fail_all("the server was stopped")
    return False

  def _step(self) -> None:
    try:
      self._turn()
    except Exception as error:
      self._fault(error)

  def _turn(self) -> None:
    for ticket in self._tickets():
      if ticket.cancelled:
        self._leave(ticket, [], None, ticket.cancelled)
    if self._leaving:
      self._engine.free(self._leaving)
      self._leaving = []
    self._enter()
    self._fill()
    # The device gets a chunk to compute before what it computed last is looked at, which hides the host's work: a token
    # of an 8B model takes 2.8 ms, and took 3.3 while the device waited. A request that the model ends has a chunk of
    # useless steps, and one that arrives waits for a chunk more.
    begun = self._decode()
    while len(self._results) > begun:
      self._results.popleft()()

  def _tickets(self) -> list[Ticket]:
    return [ticket for ticket in self._slots if ticket is not None]

  def _enter(self) -> None:
    """Waiting requests take free slots, first come, first served; cancelled ones give up their place in the queue."""
    with self._work:
      gone = [ticket for ticket in self._queue if ticket.cancelled]
      for ticket in gone:
        self._queue.remove(ticket)
      for slot, holder in enumerate(self._slots):
        if holder is None and self._queue:
          ticket = self._queue.popleft()
          ticket.enter(slot)
          self._slots[slot] = ticket
          self._filling.append(ticket)
    for ticket in gone:
      ticket.tell([], finish_reason=ticket.cancelled)

  def _leave(self, ticket: Ticket, tokens: list[int], logprobs: list[TokenLogprobs] | None, reason: str) -> None:
    self._slots[ticket.slot] = None
    self._leaving.append(ticket.slot)
    if not ticket.decoding:
      self._filling.remove(ticket)
    ticket.tell(tokens, logprobs, finish_reason=reason)

  def _fill(self) -> None:
    """One chunk of one prompt; prompts take turns, so that a short one does not wait for the whole of a long one."""
    if not self._filling:
      return
    ticket = self._filling.popleft()
    request, start = ticket.request, ticket.filled
    tokens = list(request.prompt[start : start + self.config.prefill_chunk])
    ticket.filled += len(tokens)
    if not ticket.decoding:
      self._filling.append(ticket)
    token, logprobs = self._engine.fill(
      ticket.slot,
      tokens,
      start,
      last=ticket.decoding,
      sampling=request.sampling,
      eos_token_ids=request.eos_token_ids,
    )
    if ticket.decoding:
      ticket.begun = 1
      self._results.append(functools.partial(self._emit_first, ticket, token, logprobs))

  def _decode(self) -> bool:
    """Begins a chunk of those that will want more tokens than they have coming; whether there are any."""
    rows = [t for t in self._tickets() if t.decoding and t.begun < t.request.max_new_tokens]
    if not rows:
      return False
    needs = Needs(
      draws=any(not ticket.request.sampling.greedy for ticket in rows),
      cuts=any(ticket.request.sampling.cuts for ticket in rows),
      logprobs=any(ticket.request.logprobs is not None for ticket in rows),
    )
    self._results.append(functools.partial(self._emit_chunk, rows, *self._engine.decode(needs)))
    for ticket in rows:
      ticket.begun += self.config.chunk
    self._decode_chunks += 1
    self._decoded_rows += len(rows)
    return True

  def _emit_first(self, ticket: Ticket, token: ArrayLike, logprobs: Logprobs) -> None:
    """Waits for the end of a prompt."""
    token = int(token)
    if self._slots[ticket.slot] is ticket:
      self._emit(ticket, [token], [logprobs] if ticket.request.logprobs is not None else None)

  def _emit_chunk(self, rows: list[Ticket], tokens: ArrayLike, counts: ArrayLike, logprobs: Logprobs | None) -> None:
    """Waits for a chunk of the requests that were in their slots when it was begun."""
    tokens, counts = np.asarray(tokens), np.asarray(counts)
    if logprobs is not None:
      logprobs = Logprobs(*(np.asarray(array) for array in logprobs))
    for ticket in rows:
      if self._slots[ticket.slot] is not ticket:
        continue  # it left meanwhile
      slot, count = ticket.slot, int(counts[ticket.slot])
      of_tokens = None
      if ticket.request.logprobs is not None:
        of_tokens = [Logprobs(*(array[slot, i] for array in logprobs)) for i in range(count)]
      self._emit(ticket, tokens[slot, :count].tolist(), of_tokens)

  def _emit(self, ticket: Ticket, tokens: list[int], logprobs: list[Logprobs] | None) -> None:
    """Hands new tokens to the client, no more than it asked for, and frees the slot after the last."""
    request = ticket.request
    tokens = tokens[: request.max_new_tokens - ticket.emitted]
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
    if tokens and tokens[-1] in request.eos_token_ids:
      reason = "stop"
    elif ticket.emitted + len(tokens) == request.max_new_tokens:
      reason = "length"
    else:
      ticket.tell(tokens, said)
      return
    self._faults_in_a_row = 0
    self._leave(ticket, tokens, said, reason)

  def _fault(self, error: Exception) -> None:
    _logger.exception("a step failed")
    self._faults += 1
    self._faults_in_a_row += 1
    failed, self._slots = self._tickets(), [None] * self.config.slots
    self._filling.clear()
    self._results.clear()
    self._leaving = []
    message = f"a step of the model failed: {_one_line(error)}"
    for ticket in failed:
      ticket.tell([], finish_reason="error", error=message)
    if self._faults_in_a_row >= self.config.max_faults:
      self._give_up(message)
    else:
      self._engine.reset()  # what it raises ends the thread

  def _give_up(self, failure: str) -> None:
    with self._work:
      self._stopping, self.failure = True, failure
    self._fail_all(failure)
    self._on_failure(failure)

  def _fail_all(self, message: str) -> None:
    with self._work:
      failed = [*self._tickets(), *self._queue]
      self._queue.clear()
      self._slots = [None] * self.config.slots
    for ticket in failed:
      ticket.tell([], finish_reason="error", error=message)


def _one_line(error: Exception) -> str:
  """What clients are told of an error: its kind and its first line, without the pages that a compiler may add."""
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
