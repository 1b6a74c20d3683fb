# SPDX-License-Identifier: Apache-2.0
"""From a request of the API to tickets of the scheduler, and from their events to pieces of text.

    CompletionRequest, ChatCompletionRequest -> prepare -> Completion -> pieces: (choice, Piece), ...

`prepare` runs in any thread; a Completion lives in the event loop, which the scheduler's thread hands the events to.
"""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator

from marlin_jax.generation.sampling import Sampling
from marlin_jax.serving.chat import ChatTemplate
from marlin_jax.serving.continuation import Continuation, Piece
from marlin_jax.serving.metrics import Metrics
from marlin_jax.serving.protocol import ApiError, ChatCompletionRequest, CompletionRequest
from marlin_jax.serving.request import Draining, GenerationRequest, QueueFull, TokenEvent
from marlin_jax.serving.scheduler import Scheduler
from marlin_jax.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16  # of /v1/completions; a chat may fill the context
_RETRY_AFTER = 1  # seconds: about what a slot is held for


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
  """All that answering takes.

  Attributes:
    name: what clients call the model.
    chat_template: None if the tokenizer has none; then there is no chat.
    eos_token_ids: tokens that end a text.
  """

  name: str
  tokenizer: Tokenizer
  chat_template: ChatTemplate | None
  eos_token_ids: tuple[int, ...]
  scheduler: Scheduler
  metrics: Metrics


class Completion:
  """One request of the API under way: its choices, and how many tokens they took.

  Attributes:
    choices: the Continuation of each.
    prompt_tokens: of all prompts; one with several choices counts once.
  """

  def __init__(
    self, model: ServedModel, requests: list[GenerationRequest], choices: list[Continuation], prompt_tokens: int
  ):
    self.choices, self.prompt_tokens = choices, prompt_tokens
    self._model, self._requests = model, requests

  @property
  def completion_tokens(self) -> int:
    """Tokens of all choices so far."""
    return sum(choice.token_count for choice in self.choices)

  async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
    """Submits, and yields (choice, Piece) until all choices have ended. Closing it early frees the slots.

    Raises:
      ApiError: it is not taken, or a step of the model failed.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue()
    told = [0] * len(self._requests)

    def deliver(index: int, event: TokenEvent) -> None:  # in the scheduler's thread
      self._model.metrics.observe_event(self._requests[index], told[index], event)
      told[index] += len(event.tokens)
      loop.call_soon_threadsafe(events.put_nowait, (index, event))

    try:
      tickets = self._model.scheduler.submit(self._requests, deliver)
    except QueueFull as error:
      raise ApiError(429, str(error), code="queue_full", retry_after=_RETRY_AFTER) from None
    except Draining as error:
      raise ApiError(503, str(error), code="draining", retry_after=_RETRY_AFTER) from None
    except ValueError as error:
      raise ApiError(400, str(error)) from None
    try:
      while not all(choice.ended for choice in self.choices):
        index, event = await events.get()
        if event.finish_reason == "error":
          raise ApiError(500, event.error, code="step_failed")
        choice = self.choices[index]
        if choice.ended:
          continue
        piece = choice.take(event)
        if choice.ended:
          tickets[index].cancel("stop")  # the scheduler does not know of a stop string
        if piece.text or piece.tokens or choice.ended:
          yield index, piece
    finally:
      for ticket in tickets:
        ticket.cancel()


def prepare(model: ServedModel, request: CompletionRequest | ChatCompletionRequest) -> Completion:
  """Encodes the prompts and checks what can be checked before there is a slot.

  Raises:
    ApiError: 400 or 404, naming the field.
  """
  if request.model != model.name:
    raise ApiError(404, f"the model is {model.name!r}, there is no other", param="model", code="model_not_found")
  if isinstance(request, ChatCompletionRequest):
    field, prompts = "messages", [_chat_prompt(model, request)]
    most, logprobs = request.max_completion_tokens or request.max_tokens, request.top_logprobs
    if request.logprobs:
      logprobs = logprobs or 0
  else:
    field, logprobs, most = "prompt", request.logprobs, request.max_tokens
    encode = model.tokenizer.encode
    prompts = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompt]
  eos = () if request.ignore_eos else model.eos_token_ids
  seed = secrets.randbits(32) if request.seed is None else request.seed
  requests, choices = [], []
  for prompt in prompts:
    if not prompt:
      raise ApiError(400, f"{field} holds no token", param=field)
    room = model.scheduler.config.context - len(prompt)
    if room < (most or 1):
      raise ApiError(
        400,
        f"{field} has {len(prompt)} tokens" + (f" and max_tokens={most}" if most else "") + ", together "
        f"{len(prompt) + (most or 1)}, which must be at most {model.scheduler.config.context}",
        param=field,
        code="context_length_exceeded",
      )
    default = room if field == "messages" else min(room, _DEFAULT_MAX_TOKENS)
    if any(not 0 <= token < model.scheduler.vocab_size for token in prompt):
      raise ApiError(400, f"{field} has a token id outside 0 .. {model.scheduler.vocab_size - 1}", param=field)
    for _ in range(request.n or 1):
      sampling = Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        seed=(seed + len(requests)) % 2**32,
      )
      requests.append(
        GenerationRequest(
          prompt=tuple(prompt),
          max_new_tokens=most or default,
          sampling=sampling,
          eos_token_ids=eos,
          logprobs=logprobs,
        )
      )
      stream = model.tokenizer.stream()
      stream.add(prompt)
      choices.append(Continuation(stream, request.stop or (), eos))
  return Completion(model, requests, choices, sum(map(len, prompts)))


def _chat_prompt(model: ServedModel, request: ChatCompletionRequest) -> list[int]:
  if model.chat_template is None:
    raise ApiError(400, f"{model.name} has no chat template, so there is no chat", code="no_chat_template")
  try:
    text = model.chat_template.render([{"role": m.role, "content": m.text} for m in request.messages])
  except ValueError as error:
    raise ApiError(400, str(error), param="messages") from None
  return model.tokenizer.encode(text, add_special_tokens=False)
