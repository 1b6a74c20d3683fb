# SPDX-License-Identifier: Apache-2.0
"""Slots on the device: rows of the key-value cache and of the decode state; free, being filled, or decoding.

All shapes are fixed by the ServingConfig. Which program fills a chunk of a prompt depends on where the chunk ends: it
sees the slot up to the next power of two. Which program chooses a first token, and which one decodes, depends on what
the request, or the slots, ask for (greedy, drawing, drawing from a part of the vocabulary, the same with
log-probabilities). `compile` compiles and runs each of them once, and after that nothing compiles.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from marlin_jax.generation.compilation import compile_in_threads
from marlin_jax.generation.programs import DecodeState
from marlin_jax.generation.sampling import GREEDY, Sampling
from marlin_jax.generation.weights import split
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.fuse import fuse
from marlin_jax.models.kv_cache import KVCache
from marlin_jax.serving import programs
from marlin_jax.serving.programs import Logprobs, Needs, Slots

_SMALLEST_FILL = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
  """What the server holds on the device, and for how many.

  Attributes:
    slots: requests that are decoded at the same time.
    context: positions of a slot: prompt and continuation together.
    chunk: decode steps between two looks at the queue.
    prefill_chunk: prompt tokens between two chunks of decode steps, at most; a power of two.
    queue_limit: requests that wait for a slot; further ones are turned away.
    max_eos: tokens that may end a request.
    max_logprobs: most likely tokens that are reported beside the chosen one.
    max_faults: failed steps without a finished request between them, after which the server stops taking requests.
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
  def fills(self) -> tuple[tuple[int, int], ...]:
    """(visible, width) of the programs that fill prompts: positions of the slot that one sees, tokens that it takes.

    A chunk takes the first that sees its end; so the one that begins a prompt sees nothing but itself.
    """
    powers = (1 << i for i in range(_SMALLEST_FILL.bit_length() - 1, (self.context - 1).bit_length()))
    return tuple((visible, min(visible, self.prefill_chunk)) for visible in (*powers, self.context))


# Every combination that is compiled: more than is asked for is harmless.
_PROGRAMS = (Needs(), Needs(draws=True), Needs(draws=True, cuts=True), Needs(draws=True, cuts=True, logprobs=True))


def _program_for(needs: Needs) -> Needs:
  """The first that does all that is needed."""
  wanted = ("draws", "cuts", "logprobs")
  return next(program for program in _PROGRAMS if all(getattr(program, f) >= getattr(needs, f) for f in wanted))


class Engine:
  """The device's side of the server; used by one thread.

  Attributes:
    config: the ServingConfig, its context cut to the model's.
    vocab_size: of the model.
  """

  def __init__(self, model: Decoder, config: ServingConfig):
    self.config = dataclasses.replace(config, context=min(config.context, model.config.max_position_embeddings))
    self.vocab_size = model.config.vocab_size
    self._model_config, self._dtype = model.config, model.dtype
    self._structure, self._weights = split(fuse(model))
    (self._device,) = self._weights[0].devices()
    self.reset()

  def reset(self) -> None:
    """Frees all slots, with new state: what was there may be lost after a fault."""
    rows = self.config.slots
    self._slots: Slots | None = None  # first, because there may be no room for a second cache beside it
    state = DecodeState(
      cache=KVCache.empty(self._model_config, rows, self.config.context, self._dtype),
      token=jnp.zeros(rows, jnp.int32),
      position=jnp.zeros(rows, jnp.int32),
      done=jnp.ones(rows, bool),
      seen=jnp.zeros((rows, self.vocab_size), bool),
      keys=jax.random.split(jax.random.key(0), rows),
    )
    settings = jax.tree.map(lambda setting: jnp.full(rows, setting), dataclasses.replace(GREEDY.arrays(), cuts=True))
    eos = jnp.full((rows, self.config.max_eos), -1, jnp.int32)
    # Placed where the weights are, as what the programs give back is: for an array that is not, jit compiles anew.
    self._slots = jax.device_put(Slots(state=state, settings=settings, eos=eos), self._device)

  def compile(self) -> None:
    """Compiles every program, and runs each once, so that nothing is compiled later; the slots are free afterwards."""

    def calls() -> Iterator[partial]:
      for visible, width in self.config.fills:
        yield self._fill(0, [0] * width, visible - width)
      hidden = jax.device_put(np.zeros((1, self._model_config.hidden_size), self._dtype), self._device)
      for needs in _PROGRAMS:
        yield self._begin(0, [0], hidden, needs, GREEDY, ())
      yield from map(self._decode, _PROGRAMS)

    for future in compile_in_threads(call.func.lower(*call.args, **call.keywords) for call in calls()):
      future.result()
    for visible, width in self.config.fills:
      hidden = self.fill(0, [0] * width, visible - width)
    for needs in _PROGRAMS:
      self._slots, *_ = self._begin(0, [0], hidden, needs, GREEDY, ())()
      jax.block_until_ready(self.decode(needs))
    self.free([0])
    self.reset()

  def fill(self, slot: int, tokens: list[int], start: int) -> Float[Array, "1 E"]:
    """Runs `tokens`, at most `prefill_chunk`, the prompt's from position `start` on, into a slot.

    Returns the hidden state of the last of them, which `begin` wants of a prompt's last chunk.
    """
    cache, position, hidden = self._fill(slot, tokens, start)()
    self._slots = self._slots._replace(state=self._slots.state._replace(cache=cache, position=position))
    return hidden

  def _fill(self, slot: int, tokens: list[int], start: int) -> partial:
    """The call of the program that fills this chunk; the slots of this moment are among its arguments."""
    visible, width = next(fill for fill in self.config.fills if fill[0] >= start + len(tokens))
    state, padded = self._slots.state, np.zeros(width, np.int32)
    padded[: len(tokens)] = tokens
    return partial(
      programs.fill,
      self._structure,
      self._weights,
      state.cache,
      state.position,
      np.int32(slot),
      padded,
      np.int32(start),
      np.int32(len(tokens)),
      visible=visible,
    )

  def begin(
    self,
    slot: int,
    prompt: tuple[int, ...],
    hidden: Float[Array, "1 E"],
    *,
    sampling: Sampling,
    eos_token_ids: tuple[int, ...],
    logprobs: bool,
  ) -> tuple[Int32[Array, ""], Logprobs | None]:
    """The first token of the continuation, and its log-probabilities if wanted; from now on the slot decodes.

    Args:
      prompt: all of it.
      hidden: what `fill` of its last chunk returned.
    """
    needs = Needs(draws=not sampling.greedy, cuts=sampling.cuts, logprobs=logprobs)
    self._slots, token, of_token = self._begin(slot, prompt, hidden, _program_for(needs), sampling, eos_token_ids)()
    return token, of_token

  def _begin(
    self,
    slot: int,
    prompt: Sequence[int],
    hidden: Array,
    needs: Needs,
    sampling: Sampling,
    eos_token_ids: Sequence[int],
  ) -> partial:
    """The call of the program with these needs; the slots of this moment are among its arguments."""
    padded, eos = np.zeros(self.config.context, np.int32), np.full(self.config.max_eos, -1, np.int32)
    padded[: len(prompt)], eos[: len(eos_token_ids)] = prompt, eos_token_ids
    return partial(
      programs.begin,
      self._structure,
      self._weights,
      self._slots,
      np.int32(slot),
      hidden,
      padded,
      np.int32(len(prompt)),
      np.uint32(sampling.seed),
      dataclasses.replace(sampling.arrays(), cuts=True),
      eos,
      needs=needs,
      top=self.config.max_logprobs if needs.logprobs else 0,
    )

  def decode(self, needs: Needs) -> tuple[Int32[Array, "B chunk"], Int32[Array, " B"], Logprobs | None]:
    """One chunk of steps of all slots: the tokens, how many of them each slot emitted, and their log-probabilities."""
    self._slots, tokens, counts, logprobs = self._decode(needs)()
    return tokens, counts, logprobs

  def _decode(self, needs: Needs) -> partial:
    """The call of the program that does all that is needed."""
    needs = _program_for(needs)
    top = self.config.max_logprobs if needs.logprobs else 0
    return partial(
      programs.decode, self._structure, self._weights, self._slots, needs=needs, chunk=self.config.chunk, top=top
    )

  def free(self, slots: list[int]) -> None:
    """The slots decode no longer."""
    mask = np.zeros(self.config.slots, bool)
    mask[slots] = True
    self._slots = programs.free(self._slots, mask)
