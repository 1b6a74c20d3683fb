# SPDX-License-Identifier: Apache-2.0
"""One thread that owns JAX, a bounded queue before it, events to the clients behind it.

    submit -> queue -> slots (slots.py): fill, fill, ... -> decode, decode, ... -> free
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
import gc
import logging
import threading
from collections.abc import Callable, Sequence

import jax

from marlin_jax.serving.engine import Engine
from marlin_jax.serving.request import Draining, GenerationRequest, QueueFull, Ticket, TokenEvent
from marlin_jax.serving.slots import Slots

_logger = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of JAX's, told in the thread that compiled
_ABORT_SECONDS = 5.0  # what a chunk on the device may take when everything is being stopped


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerStats:
  """What is now (queued, slots_used, cache_used), and counts since the start."""

  queued: int
  slots_used: int
  cache_used: int  # positions that hold a token of a request
  decode_chunks: int
  decoded_rows: int  # slots that were decoding, summed over the chunks: over decode_chunks it is the mean batch
  recompilations: int  # programs that the scheduler's thread has compiled since it was ready; not what others compile
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
    self._slots = Slots(engine)
    self._compiled, self._stopping, self._aborting = threading.Event(), False, False
    self._faults_in_a_row = self._faults = self._finished_at_fault = self._recompilations = 0
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
    tickets = self._slots.tickets
    return SchedulerStats(
      queued=len(self._queue),
      slots_used=len(tickets),
      cache_used=sum(ticket.filled + ticket.emitted for ticket in tickets),
      decode_chunks=self._slots.decode_chunks,
      decoded_rows=self._slots.decoded_rows,
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
      taken = len(self._queue) + len(self._slots.tickets)
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
    jax.monitoring.register_event_duration_secs_listener(self._count)
    try:
      self._engine.compile()
      # Compiling leaves half a million objects that live as long as the server. A full collection looks at all of them,
      # which takes half a second, and no token goes out meanwhile. What is frozen it passes over.
      gc.collect()
      gc.freeze()
      self._compiled.set()
      while self._wait():
        self._step()
    except Exception as error:
      _logger.exception("the scheduler ends")
      what = "the scheduler failed" if self._compiled.is_set() else "the model's programs do not compile"
      self._give_up(f"{what}: {_one_line(error)}")
    finally:
      self._compiled.set()
      gc.unfreeze()
      jax.monitoring.unregister_event_duration_listener(self._count)

  def _count(self, event: str, seconds: float, **_) -> None:
    # JAX tells of all that this process compiles: of another server, say, or of `generate` in another thread.
    if event == _COMPILED and threading.current_thread() is self._thread and self._compiled.is_set():
      self._recompilations += 1

  def _wait(self) -> bool:
    """Waits for something to do; whether there will be more."""
    with self._work:
      while not (self._queue or self._stopping or self._slots.tickets):
        self._work.wait()
      if not self._aborting:
        return bool(self._queue or self._slots.tickets)
    self._fail_all("the server was stopped")
    return False

  def _step(self) -> None:
    try:
      self._slots.sweep()
      self._enter()
      self._slots.advance()
    except Exception as error:
      self._fault(error)

  def _enter(self) -> None:
    """Waiting requests take free slots, first come, first served; cancelled ones give up their place in the queue."""
    with self._work:
      gone = [ticket for ticket in self._queue if ticket.cancelled]
      for ticket in gone:
        self._queue.remove(ticket)
      while self._queue and self._slots.free:
        self._slots.enter(self._queue.popleft())
    for ticket in gone:
      ticket.tell([], finish_reason=ticket.cancelled)

  def _fault(self, error: Exception) -> None:
    _logger.exception("a step failed")
    self._faults += 1
    self._faults_in_a_row = 1 + (self._faults_in_a_row if self._slots.finished == self._finished_at_fault else 0)
    self._finished_at_fault = self._slots.finished
    failed = self._slots.clear()
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
      failed = [*self._slots.clear(), *self._queue]
      self._queue.clear()
    for ticket in failed:
      ticket.tell([], finish_reason="error", error=message)


def _one_line(error: Exception) -> str:
  """What clients are told of an error: its kind and its first line, without the pages that a compiler may add."""
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
