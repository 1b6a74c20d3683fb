# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax serve`: a checkpoint behind a port, from the first line it prints to its exit status.

bind -> load -> listen (/health answers) -> compile -> /ready answers -> SIGTERM -> no more requests -> drain -> 0
                                                           |  a device that is lost -> /health fails -> 1
"""

import asyncio
import contextlib
import dataclasses
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from marlin_jax.checkpoint import load_model
from marlin_jax.checkpoint.folder import find_folder
from marlin_jax.models.decoder import Decoder
from marlin_jax.serving.chat import ChatTemplate
from marlin_jax.serving.completion import ServedModel
from marlin_jax.serving.engine import Engine, ServingConfig
from marlin_jax.serving.http import create_app
from marlin_jax.serving.metrics import Metrics
from marlin_jax.serving.scheduler import Scheduler

DRAIN_SECONDS = 30.0  # from SIGTERM on, for what is in flight
_MAX_HEADERS = 16 << 10  # bytes
_MAX_CONNECTIONS = 1024


def serve(
  folder: str,
  *,
  host: str = "127.0.0.1",
  port: int = 8000,
  api_key: str | None = None,
  config: ServingConfig | None = None,
) -> int:
  """Serves the model in `folder` until SIGTERM or SIGINT; returns the exit status, 1 if the model broke down.

  Args:
    folder: what `load_model` takes.
    host, port: where to listen; port 0 picks a free one, which is printed.
    api_key: what clients must send; None lets everybody in who reaches the port.
    config: a ServingConfig; None is its default.

  Raises:
    ValueError: an address that cannot be had, or a model without a tokenizer.
  """
  with _bind(host, port) as listener:
    model = load_model(folder)
    return asyncio.run(_serve(listener, model, find_folder(folder).resolve().name, api_key, config or ServingConfig()))


def served_model(model: Decoder, name: str, scheduler: Scheduler) -> ServedModel:
  """The ServedModel of a Decoder.

  Raises:
    ValueError: it has no tokenizer, or a chat template that is none.
  """
  if model.tokenizer is None:
    raise ValueError(f"{name} has no tokenizer.json, so there is no text to serve")
  return ServedModel(
    name=name,
    tokenizer=model.tokenizer,
    chat_template=ChatTemplate.of_tokenizer(model.tokenizer),
    eos_token_ids=model.config.eos_token_ids,
    scheduler=scheduler,
    metrics=Metrics(scheduler),
  )


def uvicorn_config(app: ASGIApp) -> uvicorn.Config:
  """How uvicorn runs the application: what it may hold of each connection, and of how many."""
  return uvicorn.Config(
    app,
    http="h11",
    loop="asyncio",
    ws="none",
    lifespan="off",
    log_config=None,  # the process's own: uvicorn's would close handlers of others
    log_level="warning",
    access_log=False,
    server_header=False,
    h11_max_incomplete_event_size=_MAX_HEADERS,
    limit_concurrency=_MAX_CONNECTIONS,
    # The scheduler fails what is in flight after DRAIN_SECONDS, and these answers must go out.
    timeout_graceful_shutdown=int(DRAIN_SECONDS) + 10,
  )


class _Server(uvicorn.Server):
  """uvicorn's, without its signals: it would end the process by the signal that it was drained for."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


async def _serve(listener: socket.socket, model: Decoder, name: str, api_key: str | None, config: ServingConfig) -> int:
  loop = asyncio.get_running_loop()
  config = dataclasses.replace(config, max_eos=max(config.max_eos, len(model.config.eos_token_ids)))
  broken: asyncio.Future[str] = loop.create_future()
  scheduler = Scheduler(
    Engine(model, config), on_failure=lambda failure: loop.call_soon_threadsafe(broken.set_result, failure)
  )
  app = create_app(served_model(model, name, scheduler), api_key=api_key)
  server = _Server(uvicorn_config(app))
  stopped = asyncio.Event()
  signals = 0

  def stop() -> None:
    nonlocal signals
    signals += 1
    if signals > 1:
      scheduler.abort()
    stopped.set()

  for number in (signal.SIGTERM, signal.SIGINT):
    loop.add_signal_handler(number, stop)
  address = "http://{}:{}".format(*_shown(listener))
  if api_key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
    print("no API key is set: whoever reaches this address is served", file=sys.stderr)
  serving = asyncio.create_task(server.serve(sockets=[listener]))
  while not (server.started or serving.done()):
    await asyncio.sleep(0.01)
  print(f"{name} at {address}, compiling", flush=True)
  began = time.perf_counter()
  scheduler.start(wait=False)
  waits = [asyncio.create_task(stopped.wait()), asyncio.create_task(_ready(scheduler, began)), serving, broken]
  await asyncio.wait([waits[0], serving, broken], return_when=asyncio.FIRST_COMPLETED)
  waits[1].cancel()
  if broken.done():
    print(f"marlin-jax: {broken.result()}", file=sys.stderr)
  else:
    print("stopping", flush=True)
  # Before it is ready nothing is in flight, and there is nothing to wait for.
  drained = asyncio.to_thread(scheduler.drain, DRAIN_SECONDS if scheduler.ready else 0)
  scheduler.stop()
  server.should_exit = True
  await asyncio.gather(drained, serving)
  waits[0].cancel()
  status = int(broken.done())
  if scheduler.alive:
    # It is inside a call of XLA that does not end, and the interpreter cannot end while it is.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  return status


async def _ready(scheduler: Scheduler, began: float) -> None:
  while not scheduler.ready:
    await asyncio.sleep(0.05)
  print(f"ready after {time.perf_counter() - began:.1f} s", flush=True)


def _bind(host: str, port: int) -> socket.socket:
  """A socket that has the address, before a model is loaded for nothing."""
  if not 0 <= port < 1 << 16:
    raise ValueError(f"port {port} must be in 0 .. 65535")
  listener = None
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
  except OSError as error:
    if listener is not None:
      listener.close()
    raise ValueError(f"{host}, port {port}: {error}") from None
  return listener


def _shown(listener: socket.socket) -> tuple[str, int]:
  host, port, *_ = listener.getsockname()
  return f"[{host}]" if listener.family == socket.AF_INET6 else host, port
