# SPDX-License-Identifier: Apache-2.0
"""Requests in, events out, on a tiny model: what each gets is what it gets alone, whatever happens around it."""

import dataclasses
import gc
import queue
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax import quantize
from marlin_jax.generation.loop import generate_tokens
from marlin_jax.generation.sampling import Sampling
from marlin_jax.serving import programs
from marlin_jax.serving.engine import Engine, ServingConfig
from marlin_jax.serving.request import Draining, GenerationRequest, QueueFull
from marlin_jax.serving.scheduler import Scheduler
from tests.marlin_jax.small_moe import small_moe

DRAWN = Sampling(temperature=0.9, top_p=0.8, repetition_penalty=1.2, seed=7)
TIMEOUT = 60
VOCABULARY = 512


class Client:
  """Submits a request and gathers what comes."""

  def __init__(self, scheduler, **request):
    self.events = queue.Queue()
    (self.ticket,) = scheduler.submit([GenerationRequest(**request)], lambda _, event: self.events.put(event))

  def result(self):
    """(tokens, logprobs, the last event)"""
    tokens, logprobs = [], []
    while True:
      event = self.events.get(timeout=TIMEOUT)
      tokens += event.tokens
      logprobs += event.logprobs or []
      if event.finish_reason is not None:
        return tokens, logprobs, event


def prompt_of(length, seed=0):
  return tuple(np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist())


def alone(model, prompt, new, sampling=Sampling(), eos=()):
  chunks = generate_tokens(model, [prompt], max_new_tokens=new, sampling=sampling, eos_token_ids=eos)
  return [token for (row,) in chunks for token in row]


# A prompt of 33 tokens begins with a chunk of one, one of 64 with a whole chunk; 100 has the most chunks and sees all.
@pytest.mark.parametrize("length", [33, 64, 100])
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_tokens_are_those_of_generate(scheduler, model, length, sampling):
  prompt = prompt_of(length, length)
  tokens, _, event = Client(scheduler, prompt=prompt, max_new_tokens=10, sampling=sampling).result()
  assert (tokens, event.finish_reason, event.error) == (alone(model, prompt, 10, sampling), "length", None)


def test_eos_ends_a_request_and_is_its_last_token(scheduler):
  prompt = prompt_of(33)
  free = Client(scheduler, prompt=prompt, max_new_tokens=12).result()[0]
  eos = free[5]
  tokens, _, event = Client(scheduler, prompt=prompt, max_new_tokens=12, eos_token_ids=(eos,)).result()
  assert event.finish_reason == "stop"
  assert tokens == free[: free.index(eos) + 1]


def test_a_request_gets_in_a_crowd_what_it_gets_alone(scheduler):
  before = scheduler.stats.recompilations
  rng = random.Random(5)
  requests = [
    dict(
      prompt=prompt_of(rng.randint(1, 90), i),
      max_new_tokens=rng.randint(1, 30),
      sampling=dataclasses.replace(DRAWN, seed=i, top_p=1.0 if i % 4 else 0.5) if i % 3 else Sampling(),
      logprobs=2 if i % 5 == 0 else None,
    )
    for i in range(24)
  ]
  clients = [Client(scheduler, **request) for request in requests]
  for i in rng.sample(range(24), 6):
    clients[i].ticket.cancel()
  for client, request in zip(clients, requests, strict=True):
    tokens, logprobs, event = client.result()
    want = Client(scheduler, **request).result()[0]
    if event.finish_reason == "cancelled":
      assert tokens == want[: len(tokens)] and client.ticket.cancelled
    else:
      assert (tokens, event.finish_reason) == (want, "length")
      assert len(logprobs) == (len(tokens) if request["logprobs"] else 0)
  assert scheduler.stats.recompilations == before == 0
  assert scheduler.stats.decoded_rows / scheduler.stats.decode_chunks > 1


def test_logprobs_are_those_of_the_model(scheduler, model):
  prompt = prompt_of(20)
  tokens, logprobs, _ = Client(scheduler, prompt=prompt, max_new_tokens=7, sampling=DRAWN, logprobs=3).result()
  logits = np.asarray(model(jnp.asarray([[*prompt, *tokens]])))[0, len(prompt) - 1 : -1]
  want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for token, row, said in zip(tokens, want, logprobs, strict=True):
    assert said.logprob == pytest.approx(row[token], abs=1e-3)
    assert said.top_ids == np.argsort(-row)[:3].tolist()
    np.testing.assert_allclose(said.top_logprobs, np.sort(row)[::-1][:3], atol=1e-3)


def test_a_long_prompt_does_not_stall_the_others(scheduler):
  short = Client(scheduler, prompt=prompt_of(4), max_new_tokens=100)
  short.events.get(timeout=TIMEOUT)
  order = []
  long = GenerationRequest(prompt=prompt_of(120), max_new_tokens=1)
  scheduler.submit([long], lambda _, event: order.append("long"))
  while "long" not in order:
    event = short.events.get(timeout=TIMEOUT)
    order.append("short")
    assert event.finish_reason is None
  short.ticket.cancel()
  assert order.count("short") >= 3  # four chunks of prompt, with steps of the short one between them


def test_cancelling_frees_the_slot_within_a_chunk(scheduler, config):
  clients = [Client(scheduler, prompt=prompt_of(3, i), max_new_tokens=120) for i in range(config.slots)]
  waiting = Client(scheduler, prompt=prompt_of(3), max_new_tokens=2)
  gone = Client(scheduler, prompt=prompt_of(3), max_new_tokens=2)
  gone.ticket.cancel()
  clients[0].events.get(timeout=TIMEOUT)
  clients[0].ticket.cancel()
  assert clients[0].result()[2].finish_reason == "cancelled"
  assert waiting.result()[2].finish_reason == "length"
  tokens, _, event = gone.result()
  assert (tokens, event.finish_reason) == ([], "cancelled")
  for client in clients[1:]:
    client.ticket.cancel()


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(prompt=()), "prompt is empty"),
    (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
    (dict(prompt=prompt_of(120), max_new_tokens=9), "the prompt has 120 tokens .* together 129, .* at most 128"),
    (dict(prompt=(5, 512)), "token id 512, which must be in 0 .. 511"),
    (dict(prompt=(-1,)), "token id -1"),
    (dict(logprobs=6), "logprobs=6 must be at most 5"),
    (dict(logprobs=-1), "logprobs=-1 must be at least 0"),
    (dict(eos_token_ids=tuple(range(9))), "eos_token_ids has 9 tokens, must have at most 8"),
  ],
)
def test_what_cannot_be_served_is_refused_at_once(scheduler, change, message):
  with pytest.raises(ValueError, match=message):
    Client(scheduler, **(dict(prompt=(1, 2), max_new_tokens=3) | change))


def test_a_receiver_that_raises_harms_nobody(scheduler):
  def broken(_, event):
    raise OSError("gone")

  scheduler.submit([GenerationRequest(prompt=(1, 2), max_new_tokens=20)], broken)
  assert Client(scheduler, prompt=(1, 2, 3), max_new_tokens=5).result()[2].finish_reason == "length"


def test_a_fault_fails_those_in_flight_and_the_next_ones_are_served(model, config, monkeypatch):
  scheduler = Scheduler(Engine(model, config))  # its programs are those of the other scheduler: no compiling
  scheduler.start()
  healthy_tokens = Client(scheduler, prompt=(1, 2, 3), max_new_tokens=8).result()[0]
  healthy, faults = programs.decode, iter([True])

  def faulty(*arguments, **options):
    if next(faults, False):
      raise RuntimeError("out of memory")
    return healthy(*arguments, **options)

  monkeypatch.setattr(programs, "decode", faulty)
  tokens, _, event = Client(scheduler, prompt=(1, 2, 3), max_new_tokens=8).result()
  assert event.finish_reason == "error" and "RuntimeError: out of memory" in event.error
  tokens, _, event = Client(scheduler, prompt=(1, 2, 3), max_new_tokens=8).result()
  assert (tokens, event.finish_reason) == (healthy_tokens, "length")
  assert Client(scheduler, prompt=prompt_of(60), max_new_tokens=8, logprobs=1, sampling=DRAWN).result()[2].error is None
  assert scheduler.stats.faults == 1 and scheduler.ready
  assert scheduler.stats.recompilations == 0  # the new state is like the old
  assert scheduler.drain(TIMEOUT)


def test_a_recompilation_is_what_the_server_compiles_not_what_others_do_in_its_process(model, config):
  engine = Engine(model, config)
  scheduler = Scheduler(engine)
  scheduler.start()
  Engine(model, dataclasses.replace(config, slots=3)).free([0])  # another server's program, compiled in this thread
  assert Client(scheduler, prompt=(1, 2, 3), max_new_tokens=20).result()[2].error is None
  assert scheduler.stats.recompilations == 0
  engine.config = dataclasses.replace(config, chunk=7)  # the control: a program that was not compiled before
  assert Client(scheduler, prompt=(1, 2, 3), max_new_tokens=20).result()[2].error is None
  assert scheduler.stats.recompilations == 1
  assert scheduler.drain(TIMEOUT)


def test_while_it_runs_a_full_garbage_collection_passes_over_what_compiling_left(model, config):
  scheduler = Scheduler(Engine(model, config))
  scheduler.start()
  frozen = gc.get_freeze_count()
  assert scheduler.drain(TIMEOUT)
  assert frozen > 100_000 and gc.get_freeze_count() == 0


def test_too_many_faults_in_a_row_end_it(model, config, monkeypatch):
  scheduler = Scheduler(Engine(model, config))
  scheduler.start()

  def faulty(*arguments, **options):
    raise RuntimeError("lost the device")

  monkeypatch.setattr(programs, "decode", faulty)
  clients = [Client(scheduler, prompt=(1, 2, 3), max_new_tokens=8) for _ in range(20)]
  assert {client.result()[2].finish_reason for client in clients} == {"error"}
  assert not scheduler.ready
  with pytest.raises(Draining):
    Client(scheduler, prompt=(1,), max_new_tokens=1)


def test_the_queue_is_bounded_and_draining_finishes_what_is_in_it(model, config):
  scheduler = Scheduler(Engine(model, dataclasses.replace(config, queue_limit=2)))
  scheduler.start()
  running = []
  for _ in range(config.slots):
    running.append(Client(scheduler, prompt=(1, 2), max_new_tokens=120))
    running[-1].events.get(timeout=TIMEOUT)
  waiting = [Client(scheduler, prompt=(1, 2), max_new_tokens=3) for _ in range(2)]
  with pytest.raises(QueueFull, match="2 requests wait already"):
    Client(scheduler, prompt=(1, 2), max_new_tokens=3)
  drained = threading.Thread(target=scheduler.drain, args=(TIMEOUT,))
  drained.start()
  assert [client.result()[2].finish_reason for client in (*running, *waiting)] == ["length"] * 6
  drained.join(TIMEOUT)
  with pytest.raises(Draining):
    Client(scheduler, prompt=(1,), max_new_tokens=1)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(slots=0), "slots=0 must be at least 1"),
    (dict(prefill_chunk=48), "prefill_chunk=48 must be a power of two"),
    (dict(prefill_chunk=8), "prefill_chunk=8 must be a power of two, at least 16"),
  ],
)
def test_a_config_checks_itself(change, message):
  with pytest.raises(ValueError, match=message):
    ServingConfig(**change)


def test_a_mixture_of_experts_is_served_as_it_generates():
  # What stands in other slots, and in empty ones, chooses experts too, and must change nothing.
  model = quantize(small_moe(), group_size=32, progress=False)
  nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
  scheduler = Scheduler(Engine(model, ServingConfig(slots=4, context=64, chunk=4, prefill_chunk=16, queue_limit=8)))
  scheduler.start()
  prompts = [prompt_of(length, length) for length in (3, 20, 33)]
  clients = [Client(scheduler, prompt=prompt, max_new_tokens=8) for prompt in prompts]
  tokens = [client.result()[0] for client in clients]
  assert scheduler.drain(60)
  assert tokens == [alone(model, prompt, 8) for prompt in prompts]
