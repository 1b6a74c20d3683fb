# SPDX-License-Identifier: Apache-2.0
"""Requests on the device: who is in which slot, whose prompt is filled next, and what has come of a chunk.

    slot: fill, fill, ... -> decode, decode, ... -> free

One thread calls all of it. What the device computes is begun at one turn and looked at in the next.
"""

import collections
import functools
from collections.abc import Callable

import numpy as np
from jax.typing import ArrayLike

from marlin_jax.serving.engine import Engine
from marlin_jax.serving.programs import Logprobs, Needs
from marlin_jax.serving.request import Ticket, TokenLogprobs


class Slots:
  """The slots of an engine and the requests in them.

  Attributes:
    decode_chunks: begun since the start.
    decoded_rows: slots that were decoding, summed over the chunks.
    finished: requests that came to their end, which leaves out cancelled ones.
  """

  def __init__(self, engine: Engine):
    self.decode_chunks = self.decoded_rows = self.finished = 0
    self._config, self._engine = engine.config, engine
    self._holders: list[Ticket | None] = [None] * self._config.slots
    self._filling: collections.deque[Ticket] = collections.deque()  # whose turn it is to have a chunk filled
    self._leaving: list[int] = []  # slots that still decode on the device, for nobody
    self._results: collections.deque[Callable[[], None]] = collections.deque()  # each waits for the device, and tells

  @property
  def tickets(self) -> list[Ticket]:
    """The requests in slots."""
    return [ticket for ticket in self._holders if ticket is not None]

  @property
  def free(self) -> int:
    """How many slots nobody is in."""
    return self._holders.count(None)

  def enter(self, ticket: Ticket) -> None:
    """Puts a request into a slot, of which one must be free."""
    slot = self._holders.index(None)
    ticket.enter(slot)
    self._holders[slot] = ticket
    self._filling.append(ticket)

  def clear(self) -> list[Ticket]:
    """Forgets all requests, and returns them; the engine is not told."""
    tickets, self._holders = self.tickets, [None] * self._config.slots
    self._filling.clear()
    self._results.clear()
    self._leaving = []
    return tickets

  def sweep(self) -> None:
    """Cancelled requests leave, and slots that somebody left are free on the device, too."""
    for ticket in self.tickets:
      if ticket.cancelled:
        self._leave(ticket, [], None, ticket.cancelled)
    if self._leaving:
      self._engine.free(self._leaving)
      self._leaving = []

  def advance(self) -> None:
    """Begins to fill a chunk of a prompt and to decode one for all, and hands out what was begun before."""
    self._fill()
    # The device gets a chunk to compute before what it computed last is looked at, which hides the host's work: a token
    # of an 8B model takes 2.8 ms, and took 3.3 while the device waited. A request that the model ends has a chunk of
    # useless steps, and one that arrives waits for a chunk more.
    begun = self._decode()
    while len(self._results) > begun:
      self._results.popleft()()

  def _leave(self, ticket: Ticket, tokens: list[int], logprobs: list[TokenLogprobs] | None, reason: str) -> None:
    self._holders[ticket.slot] = None
    self._leaving.append(ticket.slot)
    if not ticket.decoding:
      self._filling.remove(ticket)
    ticket.tell(tokens, logprobs, finish_reason=reason)

  def _fill(self) -> None:
    """One chunk of one prompt; prompts take turns, so that a short one does not wait for the whole of a long one."""
    if not self._filling:
      return
    ticket = self._filling.popleft()
    request, start, chunk = ticket.request, ticket.filled, self._config.prefill_chunk
    # What is no whole chunk comes first, where it sees nothing but itself: a narrow chunk at the end would need
    # programs of its own that see more of the slot.
    end = start + chunk if start else (len(request.prompt) - 1) % chunk + 1
    tokens = list(request.prompt[start:end])
    ticket.filled += len(tokens)
    if not ticket.decoding:
      self._filling.append(ticket)
    hidden = self._engine.fill(ticket.slot, tokens, start)
    if ticket.decoding:
      token, logprobs = self._engine.begin(
        ticket.slot,
        request.prompt,
        hidden,
        sampling=request.sampling,
        eos_token_ids=request.eos_token_ids,
        logprobs=request.logprobs is not None,
      )
      ticket.begun = 1
      self._results.append(functools.partial(self._emit_first, ticket, token, logprobs))

  def _decode(self) -> bool:
    """Begins a chunk of those that will want more tokens than they have coming; whether there are any."""
    rows = [t for t in self.tickets if t.decoding and t.begun < t.request.max_new_tokens]
    if not rows:
      return False
    needs = Needs(
      draws=any(not ticket.request.sampling.greedy for ticket in rows),
      cuts=any(ticket.request.sampling.cuts for ticket in rows),
      logprobs=any(ticket.request.logprobs is not None for ticket in rows),
    )
    self._results.append(functools.partial(self._emit_chunk, rows, *self._engine.decode(needs)))
    for ticket in rows:
      ticket.begun += self._config.chunk
    self.decode_chunks += 1
    self.decoded_rows += len(rows)
    return True

  def _emit_first(self, ticket: Ticket, token: ArrayLike, logprobs: Logprobs | None) -> None:
    """Waits for the end of a prompt."""
    token = int(token)
    if self._holders[ticket.slot] is ticket:
      self._emit(ticket, [token], [logprobs] if ticket.request.logprobs is not None else None)

  def _emit_chunk(self, rows: list[Ticket], tokens: ArrayLike, counts: ArrayLike, logprobs: Logprobs | None) -> None:
    """Waits for a chunk of the requests that were in their slots when it was begun."""
    tokens, counts = np.asarray(tokens), np.asarray(counts)
    if logprobs is not None:
      logprobs = Logprobs(*(np.asarray(array) for array in logprobs))
    for ticket in rows:
      if self._holders[ticket.slot] is not ticket:
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
    self.finished += 1
    self._leave(ticket, tokens, said, reason)
