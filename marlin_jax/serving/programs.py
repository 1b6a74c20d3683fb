# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of the server: they take the state of all slots and give it back, updated in place.

    fill     one chunk of one slot's prompt through the model; the last chunk chooses the first token
    decode   a chunk of steps of all slots at once; free ones run along, and what they compute is thrown away
    free     slots that decode no longer

A row computes the same whatever the other rows hold: every program has the same shapes whoever is in the slots.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32

from marlin_jax.generation.programs import Choice, DecodeState, choose
from marlin_jax.generation.sampling import SamplingArrays
from marlin_jax.generation.weights import Structure


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
  """What the slots ask of a decode step; each combination is a program."""

  draws: bool = False
  cuts: bool = False
  logprobs: bool = False


def _logprobs(logits: Float32[Array, "B V"], token: Int32[Array, " B"], top: int) -> Logprobs:
  logprobs = jax.nn.log_softmax(logits, axis=-1)
  values, tokens = jax.lax.top_k(logprobs, top)
  return Logprobs(
    chosen=jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0], top=values, top_tokens=tokens.astype(jnp.int32)
  )


@partial(jax.jit, static_argnames=("structure", "visible", "top"), donate_argnames=("slots",))
def fill(
  structure: Structure,
  weights: list[Array],
  slots: Slots,
  slot: Array,
  tokens: Int32[Array, " T"],
  start: Array,
  count: Array,
  last: Array,
  seed: Array,
  settings: SamplingArrays,
  eos: Int32[Array, " E"],
  *,
  visible: int,
  top: int,
) -> tuple[Slots, Int32[Array, ""], Logprobs]:
  """Runs `tokens[:count]`, which stand at `start` and after, into one slot.

  Of the slot's cache the first `visible` positions are read and written, and start + count must not exceed them: the
  attention of a chunk costs what it can see, and not what the slot could hold.

  Returns the slots, the first token of the continuation and its log-probabilities; both mean something if this is the
  `last` chunk of the prompt, and only then does the slot decode from now on.
  """
  model = structure.merge(weights)

  def row(array: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, slot, 1)

  def put(array: Array, value: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, value.astype(array.dtype), slot, 0)

  state = slots.state
  # Padding is to the right: no token of the prompt attends to it, and what comes next is written over it.
  hidden, cache = model.hidden(tokens[None], start[None], state.cache.head(slot, visible))
  logits = model.logits(hidden[:, count - 1])
  seen = row(state.seen) & (start > 0)
  inside = jnp.arange(tokens.shape[0]) < count
  seen = seen.at[0, jnp.where(inside, tokens, seen.shape[1])].set(True, mode="drop")
  settings_row = jax.tree.map(lambda setting: jnp.asarray(setting)[None], settings)
  before = DecodeState(
    cache=cache,
    token=tokens[count - 1][None],
    position=(start + count - 1)[None],
    done=jnp.zeros(1, bool),
    seen=seen,
    # As `generate` has it for its first row: the same request gives the same tokens there and here.
    keys=jax.random.fold_in(jax.random.key(seed), 0)[None],
  )
  after = choose(logits, before, Choice(settings=settings_row, eos=eos[None]))
  after = after._replace(
    done=after.done | ~last, seen=jnp.where(last, after.seen, seen), cache=jax.tree.map(put, state.cache, after.cache)
  )
  keys = jax.random.wrap_key_data(put(jax.random.key_data(state.keys), jax.random.key_data(after.keys)))
  others = {name: put(getattr(state, name), getattr(after, name)) for name in ("token", "position", "done", "seen")}
  slots = Slots(
    state=state._replace(cache=after.cache, keys=keys, **others),
    settings=jax.tree.map(put, slots.settings, settings_row),
    eos=put(slots.eos, eos[None]),
  )
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
