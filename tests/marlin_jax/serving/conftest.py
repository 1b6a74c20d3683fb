# SPDX-License-Identifier: Apache-2.0
"""What the tests of the server share: a tiny model with a real tokenizer, an engine without a model, and a port."""

import contextlib
import dataclasses
import logging
import pathlib
import socket
import threading
import time

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import uvicorn
from flax import nnx

from marlin_jax.models import Decoder, ModelConfig
from marlin_jax.serving.chat import ChatTemplate
from marlin_jax.serving.completion import ServedModel
from marlin_jax.serving.engine import Engine, ServingConfig
from marlin_jax.serving.http import create_app
from marlin_jax.serving.metrics import Metrics
from marlin_jax.serving.programs import Logprobs
from marlin_jax.serving.scheduler import Scheduler
from marlin_jax.serving.server import uvicorn_config
from marlin_jax.tokenizer import Tokenizer

EOS = (2, *range(300, 307))  # so many that a random model meets one
MODEL = ModelConfig(
  architecture="LlamaForCausalLM",
  vocab_size=512,
  hidden_size=32,
  intermediate_size=48,
  num_layers=1,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=256,
  eos_token_ids=EOS,
)
# All tests on a real model have these shapes: its programs are compiled once a process.
CONFIG = ServingConfig(slots=4, context=128, chunk=4, prefill_chunk=32, queue_limit=200)
# What the engine without a model writes, over and over: characters of one to four bytes.
SCRIPT = "The quick fox: héllo 🙂 wörld, 日本語 — done.\n"


@pytest.fixture(scope="session")
def config():
  return CONFIG


@pytest.fixture(scope="session")
def script():
  return SCRIPT


@pytest.fixture(scope="session")
def tokenizer():
  return Tokenizer.from_folder(pathlib.Path(__file__).parents[2] / "data" / "llama-bf16")


@pytest.fixture(scope="session")
def model(tokenizer):
  model = Decoder(MODEL, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(5))
  # On a device by name, as `load_model(device=...)` has them: state that is not there would compile everything again.
  nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
  model.tokenizer = tokenizer
  return model


@pytest.fixture(scope="session")
def scheduler(model):
  """One that runs the tiny model."""
  scheduler = Scheduler(Engine(model, CONFIG))
  scheduler.start()
  yield scheduler
  assert scheduler.drain(60)


class ScriptedEngine(Engine):
  """Writes the tokens of a script instead of a model's; checks that it is used as an engine is to be used.

  Attributes:
    gate: while it is cleared, decode waits.
    seconds: what a chunk of decode steps, or of a prompt, takes.
    failing: names of methods that raise at their next call.
  """

  def __init__(self, script, config=CONFIG, vocab_size=512):
    self.config, self.vocab_size, self.script = config, vocab_size, tuple(script)
    self.gate, self.seconds, self.failing = threading.Event(), 0.0, set()
    self.gate.set()
    self.fills = []
    self.reset()

  def _maybe_fail(self, name):
    if name in self.failing:
      self.failing.discard(name)
      raise RuntimeError(f"{name} failed\nwith a second line that is nobody's business")

  def compile(self):
    self._maybe_fail("compile")

  def reset(self):
    self._maybe_fail("reset")
    self.filled = [0] * self.config.slots
    self.next = [None] * self.config.slots  # the index of the next token; None where a slot does not decode
    self.ends = [()] * self.config.slots

  def fill(self, slot, tokens, start):
    time.sleep(self.seconds)
    self._maybe_fail("fill")
    assert 0 < len(tokens) <= self.config.prefill_chunk
    assert self.next[slot] is None, "the slot decodes still"
    assert start in (0, self.filled[slot])
    self.filled[slot] = start + len(tokens)
    self.fills.append((slot, start))
    return slot

  def begin(self, slot, prompt, hidden, *, sampling, eos_token_ids, logprobs):
    self._maybe_fail("begin")
    assert hidden == slot and self.filled[slot] == len(prompt)
    self.next[slot], self.ends[slot] = 0, eos_token_ids
    return np.int32(self._emit(slot)), self._logprobs(()) if logprobs else None

  def _emit(self, slot):
    token = self.script[self.next[slot] % len(self.script)]
    self.next[slot] = None if token in self.ends[slot] else self.next[slot] + 1
    return token

  def _logprobs(self, shape):
    n = self.config.max_logprobs
    top = np.broadcast_to(np.arange(n, dtype=np.float32) * -1, (*shape, n))
    ids = np.broadcast_to(np.arange(100, 100 + n, dtype=np.int32), (*shape, n))
    return Logprobs(np.full(shape, -0.5, np.float32), top, ids)

  def decode(self, needs):
    self.gate.wait(30)
    time.sleep(self.seconds)
    self._maybe_fail("decode")
    shape = (self.config.slots, self.config.chunk)
    tokens, counts = np.zeros(shape, np.int32), np.zeros(self.config.slots, np.int32)
    for slot in range(self.config.slots):
      while self.next[slot] is not None and counts[slot] < self.config.chunk:
        tokens[slot, counts[slot]] = self._emit(slot)
        counts[slot] += 1
    return tokens, counts, self._logprobs(shape) if needs.logprobs else None

  def free(self, slots):
    self._maybe_fail("free")
    for slot in slots:
      self.next[slot], self.filled[slot] = None, 0


@pytest.fixture(scope="session")
def scripted(tokenizer):
  """(changes of the config) -> a ScriptedEngine."""
  ids = tokenizer.encode(SCRIPT, add_special_tokens=False)

  def make(script=ids, **changes):
    return ScriptedEngine(script, dataclasses.replace(CONFIG, **changes))

  return make


@contextlib.contextmanager
def on_a_port(app):
  """The application behind a port of 127.0.0.1; yields its URL."""
  listener = socket.create_server(("127.0.0.1", 0))
  server = uvicorn.Server(uvicorn_config(app))
  thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
  thread.start()
  try:
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
  finally:
    server.should_exit = True
    thread.join(30)
    listener.close()
    assert not thread.is_alive()


class Server:
  """A server around an engine: its parts, its URL, and a client for it."""

  def __init__(self, scheduler, tokenizer, url, client):
    self.scheduler, self.tokenizer, self.url, self.client = scheduler, tokenizer, url, client

  def complete(self, **body):
    """The response to a completion."""
    return self.client.post("/v1/completions", json={"model": "tiny", "prompt": "Hello"} | body)

  def metric(self, name):
    """The value of a metric, given as it is written."""
    lines = self.client.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith(f"marlin_jax_{name} ")]
    return float(line.split()[-1])

  def wait_until(self, condition, seconds=10):
    """Waits for condition(stats)."""
    end = time.monotonic() + seconds
    while not condition(self.scheduler.stats):
      assert time.monotonic() < end, self.scheduler.stats
      time.sleep(0.005)


@contextlib.contextmanager
def server_of(scheduler, tokenizer, *, chat=True, headers=None, eos_token_ids=(2,), **options):
  """A Server for a scheduler; the model's name is "tiny"."""
  template = ChatTemplate.of_tokenizer(tokenizer) if chat else None
  served = ServedModel(
    name="tiny",
    tokenizer=tokenizer,
    chat_template=template,
    eos_token_ids=eos_token_ids,
    scheduler=scheduler,
    metrics=Metrics(scheduler),
  )
  with (
    on_a_port(create_app(served, **options)) as url,
    httpx.Client(base_url=url, timeout=30, headers=headers) as client,
  ):
    yield Server(scheduler, tokenizer, url, client)


@pytest.fixture(scope="session")
def serving():
  """(scheduler, tokenizer, options) -> a context that yields a Server."""
  return server_of


@pytest.fixture
def serve(tokenizer):
  """(engine or scheduler, options) -> a Server that runs until the test ends."""
  with contextlib.ExitStack() as stack:

    def start(engine, **options):
      running = engine if isinstance(engine, Scheduler) else Scheduler(engine)
      if running is not engine:
        running.start()
        stack.callback(running.drain, 0)
        stack.callback(engine.gate.set)
      return stack.enter_context(server_of(running, tokenizer, **options))

    yield start


@pytest.fixture
def quiet():
  """Faults on purpose need no pages of log."""
  logging.disable(logging.ERROR)
  yield
  logging.disable(logging.NOTSET)
