# SPDX-License-Identifier: Apache-2.0
"""The HTTP side: routes, the API key, limits on bodies and times, clients that go away.

Guard (key, errors, count of responses) -> Starlette's router -> Answer: body -> parse -> prepare -> pieces -> client
                                                                   |  runs until the client is gone or time is up
"""

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marlin_jax.serving.completion import Completion, ServedModel, prepare
from marlin_jax.serving.continuation import Piece
from marlin_jax.serving.protocol import ApiError, ChatCompletionRequest, CompletionRequest, parse
from marlin_jax.serving.responses import ChatFormat, CompletionFormat, usage

_logger = logging.getLogger(__name__)

MAX_BODY = 1 << 20  # bytes
BODY_SECONDS = 30.0  # for a body to arrive
REQUEST_SECONDS = 600.0  # for a request to be answered, its wait in the queue and its reader included
_FAREWELL_SECONDS = 1.0  # for the last event of a stream that is broken off


class ClientGone(Exception):
  """The client closed the connection."""


def create_app(model: ServedModel, *, api_key: str | None = None, request_seconds: float = REQUEST_SECONDS) -> ASGIApp:
  """The ASGI application.

  Args:
    model: what is served; its scheduler may still be compiling.
    api_key: what clients must send as a bearer token, on every route; None lets everybody in.
    request_seconds: what a request may take in all.
  """
  scheduler = model.scheduler

  async def health(request: Request) -> Response:
    if scheduler.failure is not None:
      raise ApiError(503, scheduler.failure, code="failed")
    return JSONResponse({"status": "ok"})

  async def ready(request: Request) -> Response:
    _check_ready(model)
    return JSONResponse({"status": "ready"})

  async def metrics(request: Request) -> Response:
    return PlainTextResponse(model.metrics.render(), media_type="text/plain; version=0.0.4")

  entry = {"id": model.name, "object": "model", "created": 0, "owned_by": "marlin_jax"}

  async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [entry]})

  async def one_model(request: Request) -> Response:
    if request.path_params["name"] != model.name:
      raise ApiError(404, f"the model is {model.name!r}, there is no other", param="model", code="model_not_found")
    return JSONResponse(entry)

  routes = [
    Route("/health", health),
    Route("/ready", ready),
    Route("/metrics", metrics),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", one_model),
    Route("/v1/completions", Answer(model, CompletionRequest, CompletionFormat, request_seconds), methods=["POST"]),
    Route("/v1/chat/completions", Answer(model, ChatCompletionRequest, ChatFormat, request_seconds), methods=["POST"]),
  ]
  handlers: Any = {ApiError: _api_error, HTTPException: _http_error, Exception: _internal_error}
  return Guard(Starlette(routes=routes, exception_handlers=handlers), model, api_key)


class Guard:
  """Around everything: the API key, a count of the responses, and the log of what is our own fault."""

  def __init__(self, app: ASGIApp, model: ServedModel, api_key: str | None):
    self._app, self._model = app, model
    self._authorization = None if api_key is None else f"Bearer {api_key}".encode()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      raise NotImplementedError(f"the server speaks HTTP only, not {scope['type']}")

    async def counted(message: Message) -> None:
      if message["type"] == "http.response.start":
        route = scope["route"].path if "route" in scope else "other"
        self._model.metrics.observe_response(route, message["status"])
      await send(message)

    if not self._allowed(scope):
      error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
      await _error_response(error)(scope, receive, counted)
      return
    try:
      await self._app(scope, receive, counted)
    except Exception:
      # Starlette has answered by `_internal_error` and raised it again; uvicorn would close the connection over it.
      _logger.exception("a request failed")

  def _allowed(self, scope: Scope) -> bool:
    if self._authorization is None:
      return True
    given = dict(scope["headers"]).get(b"authorization", b"")
    return hmac.compare_digest(given, self._authorization)


class Answer:
  """The endpoint of one kind of completion."""

  def __init__(
    self,
    model: ServedModel,
    kind: type[CompletionRequest | ChatCompletionRequest],
    format: type[CompletionFormat],
    request_seconds: float,
  ):
    self._model, self._kind, self._format, self._seconds = model, kind, format, request_seconds

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    _check_ready(self._model)
    with contextlib.suppress(ClientGone):
      parsed = parse(self._kind, await _read_body(Request(scope, receive)))
      await self._run(parsed, receive, _Writer(scope, receive, send))

  async def _run(self, parsed: CompletionRequest | ChatCompletionRequest, receive: Receive, writer: "_Writer") -> None:
    """Answers, or says why not: by a status, or by an event where the stream has begun."""
    try:
      async with asyncio.timeout(self._seconds):
        await _unless_gone(receive, self._answer(parsed, writer))
    except TimeoutError:
      error = ApiError(504, f"the request took longer than {self._seconds:g} s", code="timeout")
    except ApiError as raised:
      error = raised
    else:
      return
    if not writer.begun:
      raise error
    # A reader that is too slow for its own time may be too slow for this.
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(_FAREWELL_SECONDS):
        await writer.event(error.body(), more=False)

  async def _answer(self, request: CompletionRequest | ChatCompletionRequest, writer: "_Writer") -> None:
    # Templates and tokenizers take milliseconds for a long prompt; the event loop has other clients to serve.
    completion = await asyncio.to_thread(prepare, self._model, request)
    format = self._format(self._model.name, self._model.tokenizer)
    async with contextlib.aclosing(completion.pieces()) as pieces:
      if request.stream:
        with_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        await _stream(completion, pieces, format, with_usage, writer)
      else:
        choices: list[list[Piece]] = [[] for _ in completion.choices]
        async for index, piece in pieces:
          choices[index].append(piece)
        await writer.json(format.whole(choices, usage(completion.prompt_tokens, completion.completion_tokens)))


async def _stream(
  completion: Completion,
  pieces: AsyncIterator[tuple[int, Piece]],
  format: CompletionFormat,
  with_usage: bool,
  writer: "_Writer",
) -> None:
  begun = set()
  async for index, piece in pieces:
    chunk = format.chunk(index, piece, first=index not in begun)
    begun.add(index)
    await writer.event(chunk | {"usage": None} if with_usage else chunk)
    # Neither a queue that holds something nor a socket with room suspends: the others, and the news that this client
    # is gone, would wait for all that has piled up.
    await asyncio.sleep(0)
  if with_usage:
    await writer.event(format.usage_chunk(usage(completion.prompt_tokens, completion.completion_tokens)))
  await writer.event("[DONE]", more=False)


class _Writer:
  """Sends one answer. A stream begins with its first event, so that what fails before has a status of its own."""

  def __init__(self, scope: Scope, receive: Receive, send: Send):
    self._scope, self._receive, self._send, self.begun = scope, receive, send, False

  async def json(self, content: dict[str, Any]) -> None:
    self.begun = True
    await JSONResponse(content)(self._scope, self._receive, self._send)

  async def event(self, content: dict[str, Any] | str, *, more: bool = True) -> None:
    if not self.begun:
      self.begun = True
      headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
      raw = [(name.encode(), value.encode()) for name, value in headers.items()]
      await self._send({"type": "http.response.start", "status": 200, "headers": raw})
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    await self._send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})


async def _read_body(request: Request) -> bytes:
  """The body, of JSON and of bounded size, in bounded time."""
  # Anything else a browser would send to a foreign server unasked; JSON it asks about first.
  if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
    raise ApiError(415, "the body must be application/json")
  too_large = ApiError(413, f"the body is larger than {MAX_BODY} bytes", code="body_too_large")
  length = request.headers.get("content-length", "0")
  if not length.isdecimal() or int(length[:20]) > MAX_BODY:
    raise too_large
  body = bytearray()
  try:
    async with asyncio.timeout(BODY_SECONDS):
      while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
          raise ClientGone
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
          raise too_large
        if not message.get("more_body", False):
          return bytes(body)
  except TimeoutError:
    raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
  """Runs `work` to its end, or ends it as soon as the client is gone."""

  async def wait_for_end() -> None:
    while (await receive())["type"] != "http.disconnect":
      pass

  tasks = [asyncio.ensure_future(work), asyncio.ensure_future(wait_for_end())]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if not tasks[0].done():
      raise ClientGone
    tasks[0].result()
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _check_ready(model: ServedModel) -> None:
  if not model.scheduler.ready:
    why = model.scheduler.failure or "the server is starting or being stopped"
    raise ApiError(503, why, code="not_ready", retry_after=5)


def _error_response(error: ApiError) -> Response:
  headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
  if error.status == 401:
    headers["www-authenticate"] = "Bearer"
  return JSONResponse(error.body(), error.status, headers=headers)


async def _api_error(request: Request, error: ApiError) -> Response:
  return _error_response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
  what = {404: "there is no such route", 405: f"{request.method} is not for this route"}
  response = _error_response(ApiError(error.status_code, what.get(error.status_code, error.detail)))
  response.headers.update(error.headers or {})
  return response


async def _internal_error(request: Request, error: Exception) -> Response:
  return _error_response(ApiError(500, "internal error"))
