# SPDX-License-Identifier: Apache-2.0
"""What a chunk of a prompt reads of its slot, and which programs fill prompts."""

import dataclasses
import re
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax.generation.sampling import GREEDY
from marlin_jax.models.decoder import Decoder
from marlin_jax.serving import programs
from marlin_jax.serving.engine import Engine, ServingConfig
from marlin_jax.serving.programs import Needs

CONTEXT = 120  # no power of two, and no other dimension of the model
CONFIG = ServingConfig(slots=3, context=CONTEXT, chunk=4, prefill_chunk=32)


@pytest.fixture(scope="module")
def engine(model):
  return Engine(model, CONFIG)


def prompt_of(length):
  return np.random.default_rng(length).integers(0, 512, length).tolist()


def filled(engine, prompt, start=0, slot=1):
  hidden = engine.fill(slot, prompt[start:], start)
  token, _ = engine.begin(slot, tuple(prompt), hidden, sampling=GREEDY, eos_token_ids=(), logprobs=False)
  return int(token)


def shapes_in(jaxpr):
  """The shapes of all arrays of a program."""
  return {tuple(map(int, shape.split(","))) for shape in re.findall(r"[a-z]\d+\[([\d,]+)\]", str(jaxpr))}


@pytest.mark.parametrize(
  "context, prefill_chunk, fills",
  [
    (2048, 256, [(16, 16), (32, 32), (64, 64), (128, 128), (256, 256), (512, 256), (1024, 256), (2048, 256)]),
    (CONTEXT, 32, [(16, 16), (32, 32), (64, 32), (CONTEXT, 32)]),
    (65, 256, [(16, 16), (32, 32), (64, 64), (65, 65)]),
    (16, 16, [(16, 16)]),
    (9, 256, [(9, 9)]),
  ],
)
def test_a_prompt_is_filled_by_a_program_for_each_power_of_two_that_its_chunk_may_end_at(context, prefill_chunk, fills):
  assert ServingConfig(context=context, prefill_chunk=prefill_chunk).fills == tuple(fills)


@pytest.mark.parametrize("start, end, visible", [(0, 5, 16), (0, 17, 32), (1, 33, 64), (32, 64, 64), (33, 65, CONTEXT)])
def test_a_chunk_reads_no_more_of_its_slot_than_the_power_of_two_at_its_end(engine, monkeypatch, start, end, visible):
  traced = []

  def fill(structure, *arguments, **options):
    traced.append(jax.make_jaxpr(partial(healthy, structure, **options))(*arguments))
    return healthy(structure, *arguments, **options)

  healthy = programs.fill
  monkeypatch.setattr(programs, "fill", fill)
  filled(engine, prompt_of(end), start)
  (jaxpr,) = traced
  shapes = shapes_in(jaxpr)
  assert (1, 2, 2, min(visible, 32), visible) in shapes  # the scores, of 2 x 2 heads
  # All that is as long as a slot is the cache itself.
  assert visible == CONTEXT or {shape for shape in shapes if CONTEXT in shape} == {(3, CONTEXT, 2, 8)}


@pytest.mark.parametrize("length", [7, 16, 30])
def test_what_lies_beyond_it_changes_nothing_and_stays(engine, length):
  prompt, visible = prompt_of(length), 16 if length <= 16 else 32
  engine.reset()
  expected = filled(engine, prompt), np.asarray(engine.decode(Needs())[0])[1]
  engine.reset()
  state = engine._slots.state
  cache = jax.tree.map(lambda buffer: jnp.full_like(buffer, jnp.nan), state.cache)
  engine._slots = engine._slots._replace(state=state._replace(cache=cache))
  token = filled(engine, prompt)
  for buffer in jax.tree.leaves(engine._slots.state.cache):
    written = np.isfinite(buffer).all(axis=(2, 3))
    np.testing.assert_array_equal(written, np.outer(np.arange(3) == 1, np.arange(CONTEXT) < visible))
  tokens, _, _ = engine.decode(Needs())
  assert token == expected[0] and tokens[1].tolist() == expected[1].tolist()


def test_chunks_give_what_the_whole_prompt_gives(engine, model):
  prompt = prompt_of(110)
  engine.reset()
  for start, end in ((0, 14), (14, 46), (46, 78), (78, 110)):
    token = filled(engine, prompt[:end], start)
    assert token == int(jnp.argmax(model(jnp.asarray([prompt[:end]]))[0, -1]))


def test_what_is_compiled_is_all_that_prompts_need(model):
  # A model of its own, so that no program is there yet.
  config = dataclasses.replace(model.config, vocab_size=384, eos_token_ids=())
  other = Decoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  engine = Engine(nnx.clone(other), dataclasses.replace(CONFIG, slots=2))
  before = programs.fill._cache_size()
  compiling = []

  def listener(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiling.append(threading.current_thread())

  jax.monitoring.register_event_duration_secs_listener(listener)
  engine.compile()
  jax.monitoring.unregister_event_duration_listener(listener)
  # Four fill prompts, four choose first tokens and four decode, in threads; what frees slots is compiled by its call.
  assert len(compiling) == 13 and compiling.count(threading.current_thread()) == 1
  assert programs.fill._cache_size() - before == 4
  for end in range(1, CONTEXT):
    start = 0 if end <= 32 else end - 32
    engine.fill(0, [1] * (end - start), start)
  assert programs.fill._cache_size() - before == 4
