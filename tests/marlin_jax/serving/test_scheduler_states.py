# SPDX-License-Identifier: Apache-2.0
"""The scheduler as a state machine, on an engine without a model: whatever comes in whatever order, nothing is lost."""

import dataclasses
import itertools
import logging

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from marlin_jax.serving.request import Draining, GenerationRequest, QueueFull
from marlin_jax.serving.scheduler import Scheduler

SCRIPT = tuple(range(3, 20))
EOS = SCRIPT[4]
LIMITS = dict(slots=3, queue_limit=4, context=100, prefill_chunk=16, chunk=4, max_faults=3)


class Receiver:
  """One request's client."""

  def __init__(self, request):
    self.request, self.tokens, self.ends, self.connected, self.ticket = request, [], [], True, None

  def deliver(self, event):
    if self.ends:
      self.ends.append("an event after the end")  # what is raised here, the scheduler swallows
    if not self.connected:
      self.ends.append("disconnected")
      raise OSError("gone")
    self.tokens += event.tokens
    if event.finish_reason is not None:
      self.ends.append(event.finish_reason)


class SchedulerStates(RuleBasedStateMachine):
  make_engine = None  # set by the test

  def __init__(self):
    super().__init__()
    self.engine = type(self).make_engine()
    self.failures = []
    self.scheduler = Scheduler(self.engine, self.failures.append)
    self.slots = self.scheduler._slots
    self.receivers = []

  @rule(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=8),
    eos=st.sampled_from([(), (EOS,)]),
  )
  def submit(self, lengths, eos):
    requests = [
      GenerationRequest(prompt=(1,) * prompt, max_new_tokens=new, eos_token_ids=eos) for prompt, new in lengths
    ]
    receivers = [Receiver(request) for request in requests]
    stats = self.scheduler.stats
    room = LIMITS["slots"] + LIMITS["queue_limit"] - stats.queued - stats.slots_used
    try:
      tickets = self.scheduler.submit(requests, lambda i, event: receivers[i].deliver(event))
    except ValueError:
      assert len(requests) > LIMITS["slots"] + LIMITS["queue_limit"]
      return
    except Draining:
      assert self.scheduler.failure is not None
      return
    except QueueFull:
      assert len(requests) > room
      return
    assert len(requests) <= room and self.scheduler.failure is None
    for receiver, ticket in zip(receivers, tickets, strict=True):
      receiver.ticket = ticket
    self.receivers += receivers

  @rule()
  def step(self):
    if self.scheduler.failure is None:
      self.scheduler._step()

  @precondition(lambda self: self.receivers)
  @rule(data=st.data(), reason=st.sampled_from(["cancelled", "stop"]))
  def cancel(self, data, reason):
    data.draw(st.sampled_from(self.receivers)).ticket.cancel(reason)

  @precondition(lambda self: self.receivers)
  @rule(data=st.data())
  def disconnect(self, data):
    data.draw(st.sampled_from(self.receivers)).connected = False

  @rule(method=st.sampled_from(["fill", "decode", "free"]))
  def fail(self, method):
    self.engine.failing.add(method)

  @invariant()
  def requests_are_conserved(self):
    held = [ticket for ticket in (*self.slots._holders, *self.scheduler._queue) if ticket is not None]
    assert len(set(map(id, held))) == len(held), "a request is in two places"
    assert {id(r.ticket) for r in self.receivers if not r.ticket.ended} <= {id(ticket) for ticket in held}
    for slot, ticket in enumerate(self.slots._holders):
      assert ticket is None or ticket.slot == slot
    # Slots that decode for nobody are about to be freed; after it has given up nobody decodes at all.
    decoding = {slot for slot, at in enumerate(self.engine.next) if at is not None}
    owned = {slot for slot, ticket in enumerate(self.slots._holders) if ticket is not None and ticket.decoding}
    assert decoding <= owned | set(self.slots._leaving) or self.scheduler.failure
    assert set(map(id, self.slots._filling)) == {
      id(ticket) for ticket in self.slots._holders if ticket is not None and not ticket.decoding
    }
    assert self.scheduler.stats.queued <= LIMITS["slots"] + LIMITS["queue_limit"]
    assert len(self.failures) <= 1 and (self.scheduler.failure is not None) == bool(self.failures)

  def teardown(self):
    self.engine.failing.clear()
    for _ in range(200):
      self.step()
    for receiver in self.receivers:
      assert len(receiver.ends) == 1 and receiver.ticket.ended, receiver.ends
      whole = list(itertools.islice(itertools.cycle(SCRIPT), receiver.request.max_new_tokens))
      if receiver.request.eos_token_ids and EOS in whole:
        whole = whole[: whole.index(EOS) + 1]
      assert receiver.tokens == whole[: len(receiver.tokens)]
      if receiver.ends == ["length"] or (receiver.ends == ["stop"] and not receiver.ticket.cancelled):
        assert receiver.tokens == whole


def test_every_request_ends_exactly_once_and_no_slot_has_two_owners(scripted):
  logging.disable(logging.ERROR)  # hundreds of faults on purpose
  try:

    class Machine(SchedulerStates):
      make_engine = staticmethod(lambda: scripted(SCRIPT, **LIMITS))

    # No shrinking: a failure is short enough to read, and shrinking takes minutes.
    options = dict(max_examples=100, stateful_step_count=40, deadline=None, phases=(Phase.generate,))
    Machine.TestCase.settings = settings(**options)
    Machine.TestCase("runTest").runTest()
  finally:
    logging.disable(logging.NOTSET)


def events_of(engine, *requests):
  """(scheduler, a list of (request, event) that grows)"""
  told = []
  scheduler = Scheduler(engine)
  tickets = scheduler.submit(requests, lambda i, event: told.append((i, event)))
  return scheduler, tickets, told


def request(prompt=3, new=10):
  return GenerationRequest(prompt=(1,) * prompt, max_new_tokens=new)


def test_a_cancelled_request_gives_up_its_place_in_the_queue(scripted):
  scheduler, _, _ = events_of(scripted(SCRIPT, **LIMITS), *[request(new=90)] * 3)
  scheduler._step()
  waiting = scheduler.submit([request()] * 4, lambda *_: None)
  with pytest.raises(QueueFull, match="4 requests wait already, and 4 may"):
    scheduler.submit([request()], lambda *_: None)
  waiting[1].cancel()
  scheduler._step()
  assert waiting[1].ended and scheduler.stats.queued == 3
  scheduler.submit([request()], lambda *_: None)


def test_one_that_leaves_while_its_prompt_is_filled_is_filled_no_more(scripted):
  engine = scripted(SCRIPT, **LIMITS)
  scheduler, tickets, told = events_of(engine, request(prompt=80), request(prompt=3, new=1))
  scheduler._step()
  tickets[0].cancel()
  for _ in range(4):
    scheduler._step()
  assert [(i, event.finish_reason) for i, event in told if event.finish_reason] == [(0, "cancelled"), (1, "length")]
  assert engine.fills == [(0, 0), (1, 0)] and not scheduler._slots._filling


def test_free_slots_count_as_places(scripted):
  scheduler, _, _ = events_of(scripted(SCRIPT, **LIMITS), *[request()] * 4)
  scheduler.submit([request()] * 3, lambda *_: None)
  with pytest.raises(QueueFull):
    scheduler.submit([request()], lambda *_: None)


def test_several_requests_enter_together_or_not_at_all(scripted):
  scheduler, _, told = events_of(scripted(SCRIPT, **LIMITS), *[request()] * 4)
  scheduler.submit([request()] * 2, lambda *_: None)
  with pytest.raises(QueueFull):
    scheduler.submit([request()] * 2, lambda *_: None)
  assert scheduler.stats.queued == 6
  with pytest.raises(ValueError, match="8 requests at once, must be at most 7"):
    scheduler.submit([request()] * 8, lambda *_: None)
  assert not told


def test_a_short_prompt_does_not_wait_for_the_whole_of_a_long_one(scripted):
  scheduler, _, told = events_of(scripted(SCRIPT, **LIMITS), request(prompt=80, new=1), request(prompt=2, new=1))
  for _ in range(10):
    scheduler._step()
  assert [i for i, event in told if event.finish_reason] == [1, 0]


@pytest.mark.parametrize("prompt, starts", [(16, [0]), (17, [0, 1]), (40, [0, 8, 24]), (48, [0, 16, 32])])
def test_all_chunks_of_a_prompt_but_the_first_are_whole(scripted, prompt, starts):
  engine = scripted(SCRIPT, **LIMITS)
  scheduler, _, told = events_of(engine, request(prompt=prompt, new=1))
  for _ in range(4):
    scheduler._step()
  assert engine.fills == [(0, start) for start in starts]
  assert [event.finish_reason for _, event in told] == ["length"]


@pytest.mark.parametrize("method", ["fill", "decode", "free"])
def test_whatever_fails_everybody_in_a_slot_is_told(scripted, method):
  engine = scripted(SCRIPT, **LIMITS)
  scheduler, tickets, told = events_of(engine, *[request(new=20)] * 3)
  for _ in range(3):
    scheduler._step()
  tickets[0].cancel()
  engine.failing.add(method)
  scheduler._slots._holders[1].filled -= method == "fill"  # one has a prompt to be filled
  if method == "fill":
    scheduler._slots._filling.append(tickets[1])
    engine.next[1] = None
  scheduler._step()
  ends = [(i, event.finish_reason, event.error) for i, event in told if event.finish_reason]
  message = f"a step of the model failed: RuntimeError: {method} failed"
  assert ends == [(0, "cancelled", None), (1, "error", message), (2, "error", message)]
  assert scheduler.stats.slots_used == 0 and scheduler.stats.faults == 1


def test_faults_add_up_while_no_request_finishes(scripted):
  """The chunks of a long prompt succeed each time, and every first decode step fails: that is no recovery."""
  engine = scripted(SCRIPT, **LIMITS)
  scheduler, _, told = events_of(engine, *[request(prompt=60)] * 7)
  for _ in range(40):
    engine.failing.add("decode")
    scheduler._step()
    if scheduler.failure:
      break
  assert scheduler.stats.faults == 3 and "decode failed" in scheduler.failure
  assert sorted(i for i, event in told if event.finish_reason == "error") == list(range(7))
  with pytest.raises(Draining, match="decode failed"):
    scheduler.submit([request()], lambda *_: None)


def test_a_finished_request_forgives_the_faults_before_it(scripted):
  engine = scripted(SCRIPT, **LIMITS)
  scheduler = Scheduler(engine)
  for _ in range(4):
    for failing in (True, True, False):
      scheduler.submit([request(new=6)], lambda *_: None)
      if failing:
        engine.failing.add("decode")
      for _ in range(4):
        scheduler._step()
  assert scheduler.stats.faults == 8 and scheduler.failure is None


@pytest.mark.parametrize("method, message", [("compile", "do not compile"), ("reset", "the scheduler failed")])
def test_what_cannot_be_mended_ends_the_thread_and_everybody_is_told(scripted, method, message):
  engine, told, failures = scripted(SCRIPT, **LIMITS), [], []
  scheduler = Scheduler(engine, failures.append)
  scheduler.submit([request(new=90)] * 6, lambda i, event: told.append((i, event.finish_reason)))
  engine.failing |= {method, "decode"}
  scheduler.start(wait=False)
  scheduler._thread.join(10)
  assert not scheduler.alive and not scheduler.ready
  assert [message in failure for failure in (scheduler.failure, *failures)] == [True, True]
  assert sorted(i for i, reason in told if reason == "error") == list(range(6))
  assert scheduler.drain(1)


def test_start_raises_what_does_not_compile(scripted):
  engine = scripted(SCRIPT, **LIMITS)
  engine.failing.add("compile")
  with pytest.raises(RuntimeError, match=r"the model's programs do not compile: RuntimeError: compile failed$"):
    Scheduler(engine).start()


def test_one_that_is_drained_before_it_has_compiled_is_never_ready(scripted):
  scheduler = Scheduler(scripted(SCRIPT, **LIMITS))
  scheduler.stop()
  scheduler.start()
  assert not scheduler.ready and scheduler.drain(5)


def test_what_is_not_drained_in_time_is_failed(scripted):
  engine, told = scripted(SCRIPT, **LIMITS), []
  engine.seconds = 0.05
  scheduler = Scheduler(engine)
  scheduler.start()
  scheduler.submit([request(new=90)] * 5, lambda i, event: told.append((i, event.finish_reason, event.error)))
  assert not scheduler.drain(0.1)
  assert not scheduler.alive
  assert sorted(end for end in told if end[1]) == [(i, "error", "the server was stopped") for i in range(5)]


def test_the_last_event_says_how_long_it_took(scripted):
  engine = scripted(SCRIPT, **LIMITS)
  engine.seconds = 0.01
  scheduler, _, told = events_of(engine, request(new=9))
  scheduler.start()
  assert scheduler.drain(10)
  assert [event.timing is None for _, event in told] == [True] * (len(told) - 1) + [False]
  queued, first, total = told[-1][1].timing
  # Two chunks of four tokens follow the first, and one of them is begun before the first is looked at.
  assert 0 <= queued <= first <= total - 0.01


def test_the_device_has_a_chunk_to_compute_while_the_last_one_is_handed_out(scripted):
  scheduler, _, _ = events_of(scripted(SCRIPT, **LIMITS))
  begun = []  # (tokens, chunks begun so far) at every event
  scheduler.submit([request(new=13)], lambda _, event: begun.append((len(event.tokens), scheduler.stats.decode_chunks)))
  scheduler.start()
  assert scheduler.drain(10)
  # The first token, then three chunks of four; after the third, which is known to be the last, none is begun in vain.
  assert begun == [(1, 1), (4, 2), (4, 3), (4, 3)]


def test_a_chunk_begun_for_a_request_that_has_ended_reaches_nobody(scripted):
  engine = scripted(SCRIPT, **LIMITS)
  ending = dataclasses.replace(request(new=30), eos_token_ids=(engine.script[2],))
  scheduler, _, told = events_of(engine, ending, *[request(new=30)] * 3)
  scheduler.start()
  assert scheduler.drain(10)
  tokens = [[token for i, event in told if i == which for token in event.tokens] for which in range(4)]
  expected = [engine.script[i % len(engine.script)] for i in range(30)]
  # The fourth request was in the slot of the first while the chunk that was begun in vain was handed out.
  assert tokens == [expected[:3]] + [expected] * 3
