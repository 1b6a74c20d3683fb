# SPDX-License-Identifier: Apache-2.0
"""The two compiled programs of generation, and the state that one hands to the other.

Weights are arguments of both (split outside, merged inside); a closed-over weight would be copied into the program as a
constant. What a user sets is a traced argument, so that no value of it compiles anything.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import Future
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Key

from marlin_jax.generation.compilation import compile_in_threads
from marlin_jax.generation.sampling import SamplingArrays, sample
from marlin_jax.generation.weights import Structure
from marlin_jax.models.kv_cache import KVCache


class DecodeState(NamedTuple):
  """All that one decode step hands to the next. B rows (a power of two), S cache positions, V tokens.

  Attributes:
    cache: keys and values of every token before `position`; later positions hold anything, and are written before they
      are read.
    token: the last token of each row, chosen but not yet in the cache.
    position: where `token` goes in the cache, which is the number of tokens before it.
    done: rows that have emitted an EOS token, and the rows that pad the batch. They run along with the others, and what
      they compute is thrown away.
    seen: the tokens of the prompt and of the continuation so far, for the repetition penalty; None where prefill was
      greedy. A greedy step leaves it as it is.
    keys: one random key a row, never changed: the key of a draw is the row's key folded with the position drawn for.
  """

  cache: KVCache
  token: Int32[Array, " B"]
  position: Int32[Array, " B"]
  done: Bool[Array, " B"]
  seen: Bool[Array, "B V"] | None
  keys: Key[Array, " B"]


class Choice(NamedTuple):
  """What decides on the next token apart from the logits; arrays, so that no value of it compiles anything.

  `settings` of None is greedy without a penalty, a program of its own: it draws no random bits, and the vocabulary is
  passed over once.
  """

  settings: SamplingArrays | None
  eos: Int[Array | np.ndarray, "*B E"]


def choose(logits: Float[Array, "B V"], state: DecodeState, choice: Choice) -> DecodeState:
  """The state after the token at `state.position + 1` is chosen."""
  position = state.position + 1
  seen = state.seen
  if choice.settings is None:
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  else:
    keys = jax.vmap(jax.random.fold_in)(state.keys, position)
    token = sample(logits, seen, keys, choice.settings)
    seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
  # Not jnp.any over the last axis: a reduction is a kernel of its own, the few comparisons are part of another.
  ends = [token == choice.eos[..., i] for i in range(choice.eos.shape[-1])]
  done = functools.reduce(jnp.logical_or, ends, state.done)
  return state._replace(token=token, position=position, done=done, seen=seen)


@functools.partial(jax.jit, static_argnames=("structure", "cache_length"))
def prefill(
  structure: Structure,
  weights: list[Array],
  tokens: Int32[Array, "B T"],
  lengths: Int32[Array, " B"],
  seed: Array,
  choice: Choice,
  *,
  cache_length: int,
) -> DecodeState:
  """Runs the padded prompts through the model and chooses the first token of each row; rows of length 0 are padding.

  `cache_length`, at least T, is that of the cache in the state.
  """
  model = structure.merge(weights)
  rows, width = tokens.shape
  cache = KVCache.empty(model.config, rows, cache_length, model.dtype)
  # Padding is to the right: no prompt token attends to it, and decoding overwrites its keys and values one by one.
  hidden, view = model.hidden(tokens, jnp.zeros(rows, jnp.int32), cache.view(width))
  last = jnp.maximum(lengths - 1, 0)
  # One position a row goes through the head: T x V logits would outweigh everything else in memory.
  logits = model.logits(hidden[jnp.arange(rows), last])
  seen = None
  if choice.settings is not None:
    inside = jnp.arange(width) < lengths[:, None]
    vocab_size = logits.shape[-1]
    seen = jnp.zeros((rows, vocab_size), bool)
    seen = seen.at[jnp.arange(rows)[:, None], jnp.where(inside, tokens, vocab_size)].set(True, mode="drop")
  state = DecodeState(
    cache=view.whole(),
    token=tokens[jnp.arange(rows), last],
    position=last,
    done=lengths == 0,
    seen=seen,
    keys=jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(rows)),
  )
  return choose(logits, state, choice)


@functools.partial(jax.jit, static_argnames=("structure", "chunk"), donate_argnames=("state",))
def decode(
  structure: Structure, weights: list[Array], state: DecodeState, choice: Choice, *, chunk: int
) -> tuple[DecodeState, Int32[Array, "B {chunk}"], Int32[Array, " B"]]:
  """Runs `chunk` decode steps.

  Returns the new state, the tokens, and how many of them each row emitted: row b's are `tokens[b, :counts[b]]`. Steps
  beyond the end of the cache are harmless, and their tokens mean nothing.
  """
  # The number of steps is known, so XLA launches them without a look at the device. A loop that ended as soon as all
  # rows are done would send its predicate back to the host after every step, with the GPU idle until the answer; that
  # costs more than the few steps too many of the last chunk. With tokens selected by column, all of a step is kernels,
  # and XLA makes one CUDA graph of it; lax.dynamic_update_slice of one row would be a copy instead, and `at[].set` a
  # kernel more, which asks whether the column is inside. The caller sees nothing of a program before it ends, and every
  # call flattens hundreds of weights into arguments: hence chunks.
  model = structure.merge(weights)

  rows = state.token.shape[0]

  def decode_step(step: Array, carry: tuple) -> tuple:
    state, tokens, counts = carry
    hidden, cache = model.hidden(state.token[:, None], state.position, state.cache)
    after = choose(model.logits(hidden[:, 0]), state._replace(cache=cache), choice)
    # A row that is done never starts again, so its tokens are the first counts[b] columns.
    tokens = jnp.where(jnp.arange(chunk) == step, after.token[:, None], tokens)
    return after, tokens, jnp.where(state.done, counts, counts + 1)

  start = (state, jnp.zeros((rows, chunk), jnp.int32), jnp.zeros(rows, jnp.int32))
  return jax.lax.fori_loop(0, chunk, decode_step, start)


def compile_ahead(
  structure: Structure,
  weights: list[Array],
  tokens: Int32[Array | np.ndarray, "B T"],
  lengths: Int32[Array | np.ndarray, " B"],
  seed: np.uint32,
  choice: Choice,
  *,
  cache_length: int,
  chunk: int,
) -> Future | None:
  """Compiles `prefill` for these arguments, and the `decode` that goes on from it, which may not be through yet.

  Wait for the future before the first call of `decode`: it raises what the compiler raises. It is None where there is
  nothing to wait for, because the shapes are not new. Threads that come with the same new shapes at the same time
  compile once: JAX's caches make those wait that come second. A test holds JAX to that.
  """
  # Lowering what is compiled already costs 11 ms where there are 32 layers, as long as a prompt takes.
  shapes = (tokens.shape, choice.eos.shape, jax.tree.structure(choice), cache_length, chunk)
  if shapes in structure.compiled:
    return None

  def programs() -> Iterator[jax.stages.Lowered]:
    first = prefill.lower(structure, weights, tokens, lengths, seed, choice, cache_length=cache_length)
    yield first
    # Weights that were put on a device by name take the state with them, and jit tells such arrays from others.
    sharding = weights[0].sharding if weights[0].committed else None
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), first.out_info)
    yield decode.lower(structure, weights, state, choice, chunk=chunk)

  prefilling, decoding = compile_in_threads(programs())
  prefilling.result()
  structure.compiled.add(shapes)
  return decoding
