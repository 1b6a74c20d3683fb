# SPDX-License-Identifier: Apache-2.0
"""Slots on the device, and the programs that fill them, decode them and free them.

    slot     one row of the key-value cache and of the decode state; free, being filled, or decoding
    fill     one chunk of one slot's prompt through the model; the last chunk chooses the first token
    decode   a chunk of steps of all slots at once; free ones run along, and what they compute is thrown away

All shapes are fixed by the ServingConfig: chunks of prompts are powers of two up to `prefill_chunk`, and which decode
program runs depends on what the slots ask for (greedy, drawing, drawing from a part of the vocabulary, the same with
log-probabilities). `compile` runs each of them once, and after that nothing compiles. A row computes the same whatever
the other rows hold, because every program has the same shapes whoever is in the slots.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32

from marlin_jax.generation.loop import Choice, DecodeState, choose
from marlin_jax.generation.sampling import GREEDY, Sampling, SamplingArrays
from marlin_jax.generation.weights import Structure, split
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.fuse import fuse
from marlin_jax.models.kv_cache import KVCache

_SMALLEST_FILL = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
  """What the server holds on the device, and for how many.

  Attributes:
    slots: requests that are decoded at the same time.
    context: positions of a slot: prompt and continuation together.
    chunk: decode steps between two looks at the queue.
    prefill_chunk: prompt tokens between two chunks of decode steps, a power of two.
    queue_limit: requests that wait for a slot; further ones are turned away.
    max_eos: tokens that may end a request.
    max_logprobs: most likely tokens that are reported beside the chosen one.
    max_faults: failed steps in a row after which the server stops taking requests.
  """

  slots: int = 16
  context: int = 2048
  chunk: int = 8
  prefill_chunk: int = 256
  queue_limit: int = 64
  max_eos: int = 8
  max_logprobs: int = 5
  max_faults: int = 3

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise ValueError(f"{field.name}={getattr(self, field.name)} must be at least 1")
    if self.prefill_chunk & (self.prefill_chunk - 1) or self.prefill_chunk < _SMALLEST_FILL:
      raise ValueError(f"prefill_chunk={self.prefill_chunk} must be a power of two, at least {_SMALLEST_FILL}")

  @property
  def fills(self) -> tuple[int, ...]:
    """The widths of prompt chunks that are compiled."""
    return tuple(1 << i for i in range(_SMALLEST_FILL.bit_length() - 1, self.prefill_chunk.bit_length()))


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


# Every combination that `Engine.decode` picks from: more than is asked for is harmless, so not all are compiled.
_PROGRAMS = (Needs(), Needs(draws=True), Needs(draws=True, cuts=True), Needs(draws=True, cuts=True, logprobs=True))


class Engine:
  """The device's side of the server; used by one thread.

  Attributes:
    config: the ServingConfig, its context cut to the model's.
    vocab_size: of the model.
  """

  def __init__(self, model: Decoder, config: ServingConfig):
    longest = model.config.max_position_embeddings
    self.config = dataclasses.replace(config, context=min(config.context, longest))
    self.vocab_size = model.config.vocab_size
    self._model_config, self._dtype = model.config, model.dtype
    self._structure, self._weights = split(fuse(model))
    self._programs = (_fill, _decode, _free)
    self.reset()

  def reset(self) -> None:
    """Frees all slots, with state of its own: what was there may be lost after a fault."""
    rows = self.config.slots
    state = DecodeState(
      cache=KVCache.empty(self._model_config, rows, self.config.context, self._dtype),
      token=jnp.zeros(rows, jnp.int32),
      position=jnp.zeros(rows, jnp.int32),
      done=jnp.ones(rows, bool),
      seen=jnp.zeros((rows, self.vocab_size), bool),
      keys=jax.random.split(jax.random.key(0), rows),
    )
    settings = jax.tree.map(lambda setting: jnp.full(rows, setting), dataclasses.replace(GREEDY.arrays(), cuts=True))
    self._slots = Slots(state=state, settings=settings, eos=jnp.full((rows, self.config.max_eos), -1, jnp.int32))

  def compile(self) -> None:
    """Runs every program once, so that nothing is compiled later; the slots are free afterwards."""
    for width in self.config.fills:
      self.fill(0, [0] * width, 0, last=True, sampling=GREEDY, eos_token_ids=())
    self.free([0])
    for needs in _PROGRAMS:
      jax.block_until_ready(self.decode(needs))
    self.reset()

  @property
  def compilations(self) -> int:
    """How many programs have been compiled so far, in this process."""
    return sum(program._cache_size() for program in self._programs)

  def fill(
    self,
    slot: int,
    tokens: list[int],
    start: int,
    *,
    last: bool,
    sampling: Sampling,
    eos_token_ids: tuple[int, ...],
  ) -> tuple[Int32[Array, ""], Logprobs]:
    """Runs `tokens`, at most `prefill_chunk`, the prompt's from position `start` on, into a slot.

    Returns the first token of the continuation and its log-probabilities, which mean something if this was the last
    chunk; from then on the slot decodes.
    """
    width = next(fill for fill in self.config.fills if fill >= len(tokens))
    padded, eos = np.zeros(width, np.int32), np.full(self.config.max_eos, -1, np.int32)
    padded[: len(tokens)], eos[: len(eos_token_ids)] = tokens, eos_token_ids
    settings = dataclasses.replace(sampling.arrays(), cuts=True)
    self._slots, token, logprobs = _fill(
      self._structure,
      self._weights,
      self._slots,
      np.int32(slot),
      padded,
      np.int32(start),
      np.int32(len(tokens)),
      np.bool_(last),
      np.uint32(sampling.seed),
      settings,
      eos,
      top=self.config.max_logprobs,
    )
    return token, logprobs

  def decode(self, needs: Needs) -> tuple[Int32[Array, "B chunk"], Int32[Array, " B"], Logprobs | None]:
    """One chunk of steps of all slots: the tokens, how many of them each slot emitted, and their log-probabilities."""
    program = next(
      p for p in _PROGRAMS if all(getattr(p, f) >= getattr(needs, f) for f in ("draws", "cuts", "logprobs"))
    )
    top = self.config.max_logprobs if program.logprobs else 0
    self._slots, tokens, counts, logprobs = _decode(
      self._structure, self._weights, self._slots, needs=program, chunk=self.config.chunk, top=top
    )
    return tokens, counts, logprobs

  def free(self, slots: list[int]) -> None:
    """The slots decode no longer."""
    mask = np.zeros(self.config.slots, bool)
    mask[slots] = True
    self._slots = _free(self._slots, mask)


def _logprobs(logits: Float32[Array, "B V"], token: Int32[Array, " B"], top: int) -> Logprobs:
  logprobs = jax.nn.log_softmax(logits, axis=-1)
  values, tokens = jax.lax.top_k(logprobs, top)
  return Logprobs(
    chosen=jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0], top=values, top_tokens=tokens.astype(jnp.int32)
  )


@partial(jax.jit, static_argnames=("structure", "top"), donate_argnames=("slots",))
def _fill(
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
  top: int,
) -> tuple[Slots, Int32[Array, ""], Logprobs]:
  model = structure.merge(weights)

  def row(array: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, slot, 1)

  def put(array: Array, value: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, value.astype(array.dtype), slot, 0)

  state = slots.state
  # Padding is to the right: no token of the prompt attends to it, and what comes next is written over it.
  hidden, cache = model.hidden(tokens[None], start[None], jax.tree.map(row, state.cache))
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
def _decode(
  structure: Structure, weights: list[Array], slots: Slots, *, needs: Needs, chunk: int, top: int
) -> tuple[Slots, Int32[Array, "B chunk"], Int32[Array, " B"], Logprobs | None]:
  # `generation.loop.decode` with log-probabilities; there is the reason for a loop of known length.
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
    return after, tokens.at[:, i].set(after.token), jnp.where(state.done, counts, counts + 1), logprobs

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
def _free(slots: Slots, mask: Bool[Array, " B"]) -> Slots:
  state = slots.state
  return slots._replace(state=state._replace(done=state.done | mask, position=jnp.where(mask, 0, state.position)))
