# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from marlin_jax.generation import loop, programs
from marlin_jax.generation.loop import generate_tokens
from marlin_jax.generation.sampling import Sampling
from marlin_jax.generation.weights import split
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.fuse import fuse, unfuse
from marlin_jax.quantization import quantize

NEW = 12
PROMPTS = [[7, 3, 9], [1], list(range(20, 38)), [60, 0, 60, 0, 5]]


forward = nnx.jit(lambda model, tokens: model(tokens))


def joined(chunks):
  return [list(itertools.chain.from_iterable(row)) for row in zip(*chunks, strict=True)]


def continuations(model, prompts, max_new_tokens=NEW, chunk=4, **settings):
  return joined(generate_tokens(model, prompts, max_new_tokens=max_new_tokens, chunk=chunk, **settings))


def longhand(model, prompt, penalty=1.0):
  """Greedy decoding as it is defined: a full forward pass for every token, no cache."""
  tokens = list(prompt)
  for _ in range(NEW):
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.array(forward(model, padded)[0, len(tokens) - 1])
    for token in set(tokens):
      logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    tokens.append(int(np.argmax(logits)))
  return tokens[len(prompt) :]


@pytest.fixture
def compiled():
  """The thread of each call of XLA's compiler as JAX reports them, of any program."""
  events = []

  def listener(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      events.append(threading.current_thread())

  jax.monitoring.register_event_duration_secs_listener(listener)
  yield events
  jax.monitoring.unregister_event_duration_listener(listener)


@pytest.fixture(scope="module")
def greedy(model):
  return [longhand(model, prompt) for prompt in PROMPTS]


def test_greedy_is_the_longhand_loop(model, greedy):
  assert continuations(model, PROMPTS) == greedy
  # Rows that repeat one token would not notice a wrong position.
  assert min(len(set(row)) for row in greedy) > 3


def test_a_row_is_the_same_alone_and_in_any_batch(model, greedy):
  for prompt, expected in zip(PROMPTS, greedy, strict=True):
    assert continuations(model, [prompt]) == [expected]
  assert continuations(model, PROMPTS[::-1] + PROMPTS[:1]) == [*greedy[::-1], greedy[0]]  # padded to eight rows


def test_the_first_token_comes_alone_and_the_rest_in_chunks(model, greedy):
  chunks = list(generate_tokens(model, PROMPTS, max_new_tokens=NEW, chunk=4))
  assert [[len(row) for row in chunk] for chunk in chunks] == [[n] * 4 for n in (1, 4, 4, 3)]
  assert joined(chunks) == greedy


def test_one_new_token_needs_no_decoding(model, greedy):
  decoders = programs.decode._cache_size()
  assert continuations(model, PROMPTS, max_new_tokens=1, chunk=6) == [row[:1] for row in greedy]
  assert programs.decode._cache_size() == decoders


def test_the_next_chunk_is_begun_before_one_is_handed_out_and_none_too_many(model, greedy, monkeypatch):
  begun = Mock(wraps=programs.decode)
  monkeypatch.setattr(loop, "decode", begun)
  counts = [begun.call_count for _ in generate_tokens(model, PROMPTS, max_new_tokens=NEW, chunk=4)]
  assert NEW == 12 and counts == [0, 2, 3, 3]
  begun.reset_mock()
  ends = [row[4] for row in greedy]
  assert len(list(generate_tokens(model, PROMPTS, max_new_tokens=NEW, eos_token_ids=ends, chunk=4))) == 2
  assert begun.call_count == 2  # all rows ended in the first, when the second was on its way


def test_a_row_ends_with_its_first_eos_and_the_others_go_on(model, greedy):
  eos = greedy[0][3]
  expected = [row[: row.index(eos) + 1] if eos in row else row for row in greedy]
  assert len(expected[0]) <= 4 and max(map(len, expected)) == NEW
  assert continuations(model, PROMPTS, eos_token_ids=[eos]) == expected


def test_the_loop_ends_when_all_rows_are_done(model, greedy):
  ends = [row[4] for row in greedy]
  expected = [row[: min(row.index(end) for end in ends if end in row) + 1] for row in greedy]
  chunks = list(generate_tokens(model, PROMPTS, max_new_tokens=NEW, eos_token_ids=ends, chunk=4))
  assert joined(chunks) == expected
  assert len(chunks) <= 2


def test_an_eos_right_after_the_prompt_ends_the_row(model, greedy):
  assert continuations(model, PROMPTS[:1], eos_token_ids=[greedy[0][0]]) == [greedy[0][:1]]


def test_the_whole_context_can_be_used(model):
  context = model.config.max_position_embeddings
  prompt = [1 + i % 50 for i in range(70)]
  (row,) = continuations(model, [prompt], max_new_tokens=context - len(prompt))
  assert len(row) == context - len(prompt)
  logits = forward(model, jnp.asarray([prompt + row]))
  np.testing.assert_array_equal(row, np.argmax(logits[0, len(prompt) - 1 : -1], axis=-1))


def test_a_quantized_model_generates_by_the_same_loop(model, greedy):
  quantized = quantize(nnx.clone(model), group_size=None, progress=False)
  expected = [longhand(quantized, prompt) for prompt in PROMPTS]
  assert expected != greedy
  assert continuations(quantized, PROMPTS) == expected


@pytest.mark.parametrize("penalty", [1.3, 8.0])
def test_the_repetition_penalty_counts_prompt_and_continuation(model, greedy, penalty):
  expected = [longhand(model, prompt, penalty) for prompt in PROMPTS]
  assert expected != greedy
  assert continuations(model, PROMPTS, sampling=Sampling(repetition_penalty=penalty)) == expected


def test_a_seed_decides_the_samples(model, greedy):
  def sampled(seed):
    return continuations(model, PROMPTS, sampling=Sampling(temperature=1.0, top_k=40, seed=seed))

  assert sampled(3) == sampled(3)
  assert sampled(3) != sampled(4)
  assert sampled(3) != greedy
  assert continuations(model, PROMPTS, sampling=Sampling(temperature=1.0, top_k=1, seed=3)) == greedy


def test_samples_of_a_row_do_not_depend_on_its_neighbours(model):
  sampling = Sampling(temperature=1.0, seed=11)
  together = continuations(model, PROMPTS, sampling=sampling)
  others = continuations(model, [[2, 2], PROMPTS[1], [50] * 30, PROMPTS[3], [4]], sampling=sampling)
  assert others[1] == together[1] and others[3] == together[3]
  assert others[0] != together[0]


def test_equal_prompts_are_sampled_apart(model):
  rows = continuations(model, PROMPTS[2:3] * 3, sampling=Sampling(temperature=1.0))
  assert rows[0] != rows[1] != rows[2] != rows[0]


def test_every_position_is_drawn_afresh(model):
  rows = continuations(model, PROMPTS, sampling=Sampling(temperature=1e6))  # as good as uniform
  assert min(len(set(row)) for row in rows) > NEW // 2


def test_chunks_do_not_change_the_samples(model):
  sampling = Sampling(temperature=1.0, top_p=0.9)
  assert continuations(model, PROMPTS, sampling=sampling, chunk=5) == continuations(model, PROMPTS, sampling=sampling)


def test_nothing_compiles_for_a_new_prompt_or_new_settings_in_the_same_bucket(model, compiled):
  continuations(model, PROMPTS, eos_token_ids=[60])
  continuations(model, PROMPTS, sampling=Sampling(temperature=1.0))
  continuations(model, PROMPTS, sampling=Sampling(temperature=1.0, top_k=3))
  compiled.clear()
  continuations(model, [[5] * 32, [6, 7], [8]], max_new_tokens=32, eos_token_ids=[59, 58])
  continuations(model, [[9] * 17, [1], [2], [3]], max_new_tokens=1)
  for sampling in (
    Sampling(temperature=0.3, seed=5),
    Sampling(temperature=2.0, top_k=3, top_p=0.4, repetition_penalty=1.5, seed=6),
  ):
    continuations(model, PROMPTS, max_new_tokens=9, sampling=sampling)
  assert len(compiled) == 0
  continuations(model, [[5] * 33, [1]], max_new_tokens=10)
  assert len(compiled) == 2  # the control: a longer bucket is one more prefill and one more decode program


def new_model(model, rope_theta):
  """One of which nothing is compiled: no two tests have the same `rope_theta`."""
  config = dataclasses.replace(model.config, rope_theta=rope_theta)
  return fuse(Decoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(5)))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=9)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("placed", [False, True])
def test_prefill_and_decode_are_compiled_once_each_ahead_of_their_calls(model, compiled, sampling, placed):
  new = new_model(model, 2e4 + sampling.temperature + 2 * placed)
  if placed:  # as `load_model(device=...)` has it: for jit, arrays of another kind
    nnx.update(new, jax.device_put(nnx.state(new), jax.devices()[0]))
  compiled.clear()
  rows = continuations(new, PROMPTS, sampling=sampling)
  assert len(compiled) == 2 and threading.current_thread() not in compiled  # where a call would have compiled
  assert continuations(new, PROMPTS, sampling=sampling) == rows
  assert len(compiled) == 2
  if sampling.greedy:
    assert rows == [longhand(new, prompt) for prompt in PROMPTS]


def test_one_new_token_compiles_prefill_alone(model, compiled):
  new = new_model(model, 3e4)
  compiled.clear()
  continuations(new, PROMPTS, max_new_tokens=1)
  assert len(compiled) == 1


def test_threads_that_begin_with_a_new_model_fuse_and_compile_it_once(model, compiled):
  new = unfuse(new_model(model, 6e4))
  compiled.clear()
  together = threading.Barrier(4)

  def rows(_):
    together.wait(60)
    return continuations(new, PROMPTS)

  with ThreadPoolExecutor(4) as pool:
    first, *others = pool.map(rows, range(4))
  assert len(compiled) == 2
  assert others == [first] * 3
  assert first == [longhand(new, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_what_the_compiler_raises_reaches_the_caller_and_the_next_call_begins_anew(model, monkeypatch, program):
  new = new_model(model, {"prefill": 4e4, "decode": 5e4}[program])
  compile_program = jax.stages.Lowered.compile

  def fail(lowered):
    if f"module @jit_{program} " in lowered.as_text():
      raise RuntimeError(f"{program} does not fit")
    return compile_program(lowered)

  chunks = []
  with monkeypatch.context() as patched:
    patched.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(RuntimeError, match=f"{program} does not fit"):
      chunks.extend(generate_tokens(new, PROMPTS, max_new_tokens=NEW, chunk=4))
  assert len(chunks) == (program == "decode")  # the first token needs prefill alone
  rows = continuations(new, PROMPTS)
  assert [len(row) for row in rows] == [NEW] * len(PROMPTS)
  assert not chunks or [row[:1] for row in rows] == chunks[0]


def prefilled(model):
  structure, weights = split(model)
  choice = programs.Choice(settings=Sampling(repetition_penalty=2).arrays(), eos=np.full(4, -1, np.int32))
  tokens, lengths = np.ones((4, 32), np.int32), np.full(4, 3, np.int32)
  arguments = (structure, weights, tokens, lengths, np.uint32(0), choice)
  return structure, weights, choice, arguments, programs.prefill(*arguments, cache_length=64)


def test_prefill_marks_the_prompt_and_the_first_token_as_seen_but_no_padding(model):
  structure, weights, choice, _, _ = prefilled(model)
  tokens = np.zeros((4, 32), np.int32)
  tokens[0, :3], tokens[1, :2], tokens[2, :5] = [5, 9, 5], [0, 7], [1, 2, 3, 4, 60]
  lengths = np.array([3, 2, 5, 0], np.int32)  # the last row pads the batch
  state = programs.prefill(structure, weights, tokens, lengths, np.uint32(0), choice, cache_length=64)
  for row, prompt in enumerate([{5, 9}, {0, 7}, {1, 2, 3, 4, 60}]):
    assert set(np.flatnonzero(state.seen[row])) == prompt | {int(state.token[row])}
  np.testing.assert_array_equal(state.position[:3], lengths[:3])
  np.testing.assert_array_equal(state.done, [False, False, False, True])


def test_prefill_attends_to_the_prompts_and_not_to_the_room_after_them(model):
  structure, weights, _, (_, _, *arguments), _ = prefilled(model)
  program = str(jax.make_jaxpr(partial(programs.prefill, structure, cache_length=77))(weights, *arguments))
  shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"[a-z]\d+\[([\d,]+)\]", program)}
  assert (4, 1, 2, 32, 32) in shapes  # the scores
  assert {shape for shape in shapes if 77 in shape} == {(4, 77, 1, 16)}  # the cache


def test_a_row_that_is_done_emits_nothing_more(model):
  structure, weights, choice, _, state = prefilled(model)
  positions = np.asarray(state.position)
  done = state._replace(done=jnp.array([True, False, True, False]))
  after, tokens, counts = programs.decode(structure, weights, done, choice, chunk=4)
  np.testing.assert_array_equal(counts, [0, 4, 0, 4])
  np.testing.assert_array_equal(after.position, positions + 4)
  np.testing.assert_array_equal(after.token, tokens[:, -1])


def test_greedy_without_a_penalty_keeps_no_account_of_the_tokens(model):
  structure, weights, choice, arguments, _ = prefilled(model)
  greedy = choice._replace(settings=None)
  state = programs.prefill(*arguments[:-1], greedy, cache_length=64)
  assert state.seen is None
  after, _, _ = programs.decode(structure, weights, state, greedy, chunk=4)
  assert after.seen is None


def test_the_state_is_donated_and_the_weights_are_not(model):
  structure, weights, choice, _, state = prefilled(model)
  after, _, _ = programs.decode(structure, weights, state, choice, chunk=4)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, weights)))


def largest_constant(program):
  """Elements of the largest constant of a lowered program that is not one value throughout."""
  constants = re.findall(r'stablehlo\.constant dense<["\[].*?> : tensor<([0-9x]+)x', program.as_text())
  return max((int(np.prod([int(dim) for dim in shape.split("x")])) for shape in constants), default=0)


def test_weights_are_arguments_and_never_constants(model):
  structure, weights, choice, arguments, state = prefilled(model)
  assert largest_constant(programs.prefill.lower(*arguments, cache_length=64)) < 100
  assert largest_constant(programs.decode.lower(structure, weights, state, choice, chunk=4)) < 100
  closed_over = jax.jit(lambda tokens: model(tokens)).lower(jnp.ones((1, 4), jnp.int32))
  assert largest_constant(closed_over) >= 61 * 32  # the control: the embedding


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"prompts": []}, "prompts is empty: there must be at least one prompt"),
    ({"prompts": [[1], []]}, r"prompts\[1\] is empty: it must hold at least one token"),
    ({"prompts": "words"}, "prompts='words' must be a list of prompts, each a list of token ids"),
    ({"prompts": [1, 2]}, r"prompts\[0\]=1 must be a list of token ids"),
    ({"prompts": ["words"]}, r"prompts\[0\]='words' must be a list of token ids"),
    ({"prompts": [[1.5]]}, r"prompts\[0\] has the token id 1\.5, which must be an integer in 0 \.\. 60"),
    ({"prompts": [[1], [3, 61]]}, r"prompts\[1\] has the token id 61, which must be an integer in 0 \.\. 60"),
    ({"prompts": [[-1]]}, r"prompts\[0\] has the token id -1, which must be an integer in 0 \.\. 60"),
    ({"prompts": [[1], [1] * 101]}, r"prompts\[1\] has 101 tokens and max_new_tokens=4, together 105, which must"),
    ({"prompts": [[1] * 97]}, r"together 101, which must be at most 100, the model's context"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be an integer, at least 1"),
    ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5 must be an integer, at least 1"),
    ({"chunk": 0}, "chunk=0 must be an integer, at least 1"),
    ({"sampling": None}, r"sampling=None must be a marlin_jax\.generation\.sampling\.Sampling"),
  ],
  ids=str,
)
def test_a_bad_argument_is_refused_by_name_at_the_call(monkeypatch, model, arguments, message):
  # Users run without the type checker of the tests, so wrong types must reach our own message.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=message):
    generate_tokens(model, **({"prompts": [[1, 2]], "max_new_tokens": 4} | arguments))
