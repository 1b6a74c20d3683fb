# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of the server: they take the state of all slots and give it back, updated in place.

    fill     one chunk of one slot's prompt through the model
    begin    the first token behind the last chunk: the slot decodes
    decode   a chunk of steps of all slots at once; free ones run along, and what they compute is thrown away
    free     slots that decode no longer

A row computes the same whatever the other rows hold: every program has the same shapes whoever is in the slots.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from marlin_jax.generation.programs import Choice, DecodeState, choose
from marlin_jax.generation.sampling import SamplingArrays
from marlin_jax.generation.weights import Structure
from marlin_jax.models.kv_cache import KVCache


class Logprobs(NamedTuple):
  """Log-probabilities (natural, of the model's own logits) of the chosen tokens and of the most likely ones."""

  chosen: Float32[Array, "..."]
  top: Float32[Array, "... n"]
  top_tokens: Int32[Array, "... n"]


class Slots(NamedTuple):
  """The decode state of all slots, and the settings of the request in each: what the programs take and give back."""

  state: DecodeState
  settings: SamplingArrays
  eos: Int32[Array, "B E"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
  """What the slots ask of a decode step, or a request of its first token; each combination is a program."""

  draws: bool = False
  cuts: bool = False
  logprobs: bool = False


def _logprobs(logits: Float32[Array, "B V"], token: Int32[Array, " B"], top: int) -> Logprobs:
  logprobs = jax.nn.log_softmax(logits, axis=-1)
  values, tokens = jax.lax.top_k(logprobs, top)
  return Logprobs(
    chosen=jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0], top=values, top_tokens=tokens.astype(jnp.int32)
  )


@partial(jax.jit, static_argnames=("structure", "visible"), donate_argnames=("cache", "position"))
def fill(
  structure: Structure,
  weights: list[Array],
  cache: KVCache,
  position: Int32[Array, " B"],
  slot: Array,
  tokens: Int32[Array, " T"],
  start: Array,
  count: Array,
  *,
  visible: int,
) -> tuple[KVCache, Int32[Array, " B"], Float[Array, "1 E"]]:
  """Runs `tokens[:count]`, which stand at `start` and after, into one slot.

  Of the slot's cache the first `visible` positions are read and written, and start + count must not exceed them: the
  attention of a chunk costs what it can see, and not what the slot could hold.

  Returns the cache and the positions, of which the slot's is behind the chunk: a slot that does not decode yet runs
  along, and what it writes there is written over. And the hidden state of the last token, for `begin`.
  """
  model = structure.merge(weights)
  # Padding is to the right: no token of the prompt attends to it, and what comes next is written over it.
  hidden, view = model.hidden(tokens[None], start[None], cache.view(visible, slot))
  return view.whole(), position.at[slot].set(start + count), hidden[:, count - 1]


@partial(jax.jit, static_argnames=("structure", "needs", "top"), donate_argnames=("slots",))
def begin(
  structure: Structure,
  weights: list[Array],
  slots: Slots,
  slot: Array,
  hidden: Float[Array, "1 E"],
  prompt: Int32[Array, " S"],
  count: Array,
  seed: Array,
  settings: SamplingArrays,
  eos: Int32[Array, " eos"],
  *,
  needs: Needs,
  top: int,
) -> tuple[Slots, Int32[Array, ""], Logprobs | None]:
  """A slot decodes from now on, whose prompt is `prompt[:count]` and of whose last token `fill` returned `hidden`.

  Not part of `fill`, so that a prompt's program is there once, and a greedy request sorts no vocabulary.

  Returns the slots, the first token of the continuation and, if needed, its log-probabilities.
  """
  logits = structure.merge(weights).logits(hidden)

  def put(array: Array, value: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, value.astype(array.dtype), slot, 0)

  state, vocab_size = slots.state, logits.shape[-1]
  inside = jnp.where(jnp.arange(prompt.shape[0]) < count, prompt, vocab_size)
  settings = jax.tree.map(lambda setting: jnp.asarray(setting)[None], settings)
  before = DecodeState(
    cache=state.cache,
    token=prompt[count - 1][None],
    position=(count - 1)[None],
    done=jnp.zeros(1, bool),
    seen=jnp.zeros((1, vocab_size), bool).at[0, inside].set(True, mode="drop"),
    # As `generate` has it for its first row: the same request gives the same tokens there and here.
    keys=jax.random.fold_in(jax.random.key(seed), 0)[None],
  )
  chosen = dataclasses.replace(settings, cuts=needs.cuts) if needs.draws else None
  after = choose(logits, before, Choice(settings=chosen, eos=eos[None]))
  keys = jax.random.wrap_key_data(put(jax.random.key_data(state.keys), jax.random.key_data(after.keys)))
  others = {name: put(getattr(state, name), getattr(after, name)) for name in ("token", "position", "done", "seen")}
  slots = Slots(
    state=state._replace(keys=keys, **others),
    settings=jax.tree.map(put, slots.settings, settings),
    eos=put(slots.eos, eos[None]),
  )
  logprobs = None
  if needs.logprobs:
    logprobs = jax.tree.map(lambda array: array[0], _logprobs(logits, after.token, top))
  return slots, after.token[0], logprobs


@partial(jax.jit, static_argnames=("structure", "needs", "chunk", "top"), donate_argnames=("slots",))
def decode(
  structure: Structure, weights: list[Array], slots: Slots, *, needs: Needs, chunk: int, top: int
) -> tuple[Slots, Int32[Array, "B chunk"], Int32[Array, " B"], Logprobs | None]:
  """`chunk` steps of all slots: the slots, the tokens, how many each emitted, and their log-probabilities if needed."""
  # `generation.programs.decode` with log-probabilities; there is the reason for a loop of known length.
  model = structure.merge(weights)
  rows = slots.state.token.shape[0]
  settings = dataclasses.replace(slots.settings, cuts=needs.cuts) if needs.draws else None
  choice = Choice(settings=settings, eos=slots.eos)

  def step(i: Int[Array, ""], carry: tuple) -> tuple:
    state, tokens, counts, logprobs = carry
    hidden, cache = model.hidden(state.token[:, None], state.position, state.cache)
    logits = model.logits(hidden[:, 0])
    after = choose(logits, state._replace(cache=cache), choice)
    if needs.logprobs:
      logprobs = jax.tree.map(lambda all, one: all.at[:, i].set(one), logprobs, _logprobs(logits, after.token, top))
    tokens = jnp.where(jnp.arange(chunk) == i, after.token[:, None], tokens)
    return after, tokens, jnp.where(state.done, counts, counts + 1), logprobs

  empty = None
  if needs.logprobs:
    empty = Logprobs(
      chosen=jnp.zeros((rows, chunk)),
      top=jnp.zeros((rows, chunk, top)),
      top_tokens=jnp.zeros((rows, chunk, top), jnp.int32),
    )
  start = (slots.state, jnp.zeros((rows, chunk), jnp.int32), jnp.zeros(rows, jnp.int32), empty)
  state, tokens, counts, logprobs = jax.lax.fori_loop(0, chunk, step, start)
  # A slot that does not decode stays as it is: its keys and values of these steps will be written over, by the next
  # chunk of its prompt or by the next request, and the attention of a free slot reads a few keys only.
  idle = slots.state.done
  position = jnp.where(idle, slots.state.position, state.position)
  seen = jnp.where(idle[:, None], slots.state.seen, state.seen)
  return slots._replace(state=state._replace(position=position, seen=seen)), tokens, counts, logprobs


@partial(jax.jit, donate_argnames=("slots",))
def free(slots: Slots, mask: Bool[Array, " B"]) -> Slots:
  """The slots in `mask` decode no longer."""
  state = slots.state
  return slots._replace(state=state._replace(done=state.done | mask, position=jnp.where(mask, 0, state.position)))
