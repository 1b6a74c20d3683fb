# SPDX-License-Identifier: Apache-2.0
"""The server stays up: every refusal, clients that leave, readers that do not read, steps that fail, crowds.

The engine writes a script instead of a model's tokens, so that a test decides when a step ends and how it fails.
"""

import asyncio
import contextlib
import json
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from marlin_jax.serving import http
from marlin_jax.serving.scheduler import Scheduler

ROUTES = [
  ("GET", "/health"),
  ("GET", "/ready"),
  ("GET", "/metrics"),
  ("GET", "/v1/models"),
  ("GET", "/v1/models/tiny"),
  ("POST", "/v1/completions"),
  ("POST", "/v1/chat/completions"),
  ("GET", "/nowhere"),
]


@pytest.fixture
def server(scripted, serve):
  return serve(scripted())


def error_of(response):
  """The error in a response, which has OpenAI's shape and no trace."""
  content = response.json()
  assert list(content) == ["error"] and set(content["error"]) == {"message", "type", "param", "code"}
  assert "Traceback" not in response.text and 'File "' not in response.text
  return content["error"]


def events_of(text):
  """The events of a stream, parsed; the last is "[DONE]"."""
  events = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
  return [event if event == "[DONE]" else json.loads(event) for event in events]


def raw(server, head, body=b""):
  """A connection that has sent a request by hand."""
  host, port = server.url.removeprefix("http://").split(":")
  connection = socket.create_connection((host, int(port)), timeout=10)
  connection.sendall(head.replace("\n", "\r\n").encode() + body)
  return connection


def post_head(length, path="/v1/completions"):
  return f"POST {path} HTTP/1.1\nhost: x\ncontent-type: application/json\ncontent-length: {length}\n\n"


def raw_completion(server, **body):
  content = json.dumps({"model": "tiny", "prompt": "Hello"} | body).encode()
  return raw(server, post_head(len(content)), content)


# Answers


def test_a_completion_and_its_stream_are_the_same_text(server, script):
  answer = server.complete(max_tokens=60).json()
  (choice,) = answer["choices"]
  tokens = server.tokenizer.encode(script, add_special_tokens=False)
  want = server.tokenizer.decode((tokens * 2)[:60])
  assert (choice["text"], choice["finish_reason"], choice["index"]) == (want, "length", 0)
  prompt = len(server.tokenizer.encode("Hello"))
  assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 60, "total_tokens": prompt + 60}
  response = server.complete(max_tokens=60, stream=True, stream_options={"include_usage": True})
  assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
  *chunks, last, done = events_of(response.text)
  assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == want
  assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
  assert {chunk["id"] for chunk in (*chunks, last)} == {last["id"]} and last["id"] != answer["id"]
  assert (last["choices"], last["usage"], done) == ([], answer["usage"], "[DONE]")


def test_a_stop_string_ends_it_frees_the_slot_and_nothing_of_it_gets_out(scripted, serve):
  engine = scripted(context=4000)
  engine.seconds = 0.005
  server = serve(engine)
  for stream in (False, True):
    response = server.complete(max_tokens=3000, stop=["wörld", "never"], stream=stream)
    if stream:
      choices = [event["choices"][0] for event in events_of(response.text)[:-1]]
      assert choices[-1]["finish_reason"] == "stop"
      text = "".join(choice["text"] for choice in choices)
    else:
      assert response.json()["choices"][0]["finish_reason"] == "stop"
      text = response.json()["choices"][0]["text"]
    assert text == "The quick fox: héllo 🙂 "
  server.wait_until(lambda stats: stats.slots_used == 0)
  assert server.scheduler.stats.decode_chunks < 3000 / 4
  assert server.client.get("/metrics").text.count('requests_finished_total{reason="stop"} 2.0') == 1


def test_choices_of_several_prompts_are_numbered(server):
  answer = server.complete(prompt=["a", [5, 6, 7]], n=2, max_tokens=5).json()
  assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
  assert answer["usage"]["completion_tokens"] == 20
  assert answer["usage"]["prompt_tokens"] == len(server.tokenizer.encode("a")) + 3


def test_the_stream_of_several_choices_says_whose_each_piece_is(server):
  whole = [choice["text"] for choice in server.complete(n=3, max_tokens=9).json()["choices"]]
  texts = [""] * 3
  for event in events_of(server.complete(n=3, max_tokens=9, stream=True).text)[:-1]:
    texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
  assert texts == whole


def test_routes_tell_what_is_there(server):
  assert server.client.get("/health").json() == {"status": "ok"}
  assert server.client.get("/ready").json() == {"status": "ready"}
  (model,) = server.client.get("/v1/models").json()["data"]
  assert (model["id"], model["object"]) == ("tiny", "model") and server.client.get("/v1/models/tiny").json() == model


# Refusals


@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer wrong", "Bearer secret-", "bearer secret", "secret"])
def test_without_the_key_no_route_answers(scripted, serve, key):
  server = serve(scripted(), api_key="secret")
  headers = {} if key is None else {"authorization": key}
  for method, path in ROUTES:
    response = server.client.request(method, path, headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key"), path
    assert response.headers["www-authenticate"] == "Bearer"


def test_with_the_key_every_route_answers(scripted, serve):
  server = serve(scripted(), api_key="sécret", headers={"authorization": "Bearer sécret".encode()})
  statuses = [server.client.request(method, path).status_code for method, path in ROUTES]
  assert statuses == [200] * 5 + [415] * 2 + [404]
  assert server.complete(max_tokens=1).status_code == 200


@pytest.mark.parametrize(
  "method, path, status, message",
  [
    ("GET", "/nowhere", 404, "there is no such route"),
    ("GET", "/v1/models/other", 404, "there is no other"),
    ("GET", "/v1/completions", 405, "GET is not for this route"),
    ("POST", "/health", 405, "POST is not for this route"),
    ("POST", "/v1/embeddings", 404, "there is no such route"),
  ],
)
def test_routes_that_are_none_say_so(server, method, path, status, message):
  response = server.client.request(method, path)
  assert response.status_code == status and message in error_of(response)["message"]


@pytest.mark.parametrize(
  "body, status, param, code, message",
  [
    ({"model": "gpt-4"}, 404, "model", "model_not_found", "the model is 'tiny'"),
    ({"prompt": [1] * 128}, 400, "prompt", "context_length_exceeded", "128 tokens, together 129, .* at most 128"),
    ({"prompt": [1] * 120, "max_tokens": 9}, 400, "prompt", "context_length_exceeded", "120 tokens and max_tokens=9"),
    ({"prompt": "word " * 5000}, 400, "prompt", "context_length_exceeded", "at most 128"),
    ({"max_tokens": 10**30}, 400, "prompt", "context_length_exceeded", "at most 128"),
    ({"prompt": [512]}, 400, "prompt", None, r"outside 0 \.\. 511"),
    ({"prompt": [-1]}, 400, "prompt", None, r"outside 0 \.\. 511"),
    ({"prompt": [10**30]}, 400, "prompt", None, r"outside 0 \.\. 511"),
    ({"tools": []}, 400, "tools", "unsupported_field", "tools is not supported"),
    ({"temperature": 3}, 400, "temperature", None, "less than or equal to 2"),
  ],
  ids=str,
)
def test_what_cannot_be_served_is_refused_and_the_server_lives(server, body, status, param, code, message):
  response = server.complete(**body)
  error = error_of(response)
  assert (response.status_code, error["param"], error["code"]) == (status, param, code)
  assert re.search(message, error["message"])
  assert server.complete(max_tokens=2).status_code == 200


@pytest.mark.parametrize(
  "content",
  [b"", b"{", b"[]", b"\x00" * 100, b'{"model": "tiny"}', b"[" * 200_000, b'{"model":"tiny","prompt":"\\ud800"}'],
  ids=lambda content: repr(content[:20]),
)
def test_malformed_bodies_are_refused_and_the_server_lives(server, content):
  for path in ("/v1/completions", "/v1/chat/completions"):
    response = server.client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and error_of(response)["message"]
  assert server.complete(max_tokens=2).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonl"])
def test_only_json_is_taken(server, kind):
  response = server.client.post(
    "/v1/completions", content=b'{"model":"tiny","prompt":"a"}', headers={"content-type": kind} if kind else {}
  )
  assert response.status_code == 415 and "application/json" in error_of(response)["message"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server):
  connection = raw(server, post_head(http.MAX_BODY + 1))
  assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
  connection.close()


def test_a_body_that_grows_too_large_is_refused(server):
  def endless():
    yield b'{"model": "tiny", "prompt": "'
    for _ in range(40):
      yield b"a" * (http.MAX_BODY // 16)

  # The server may close before the client has sent all.
  with contextlib.suppress(httpx.WriteError):
    response = server.client.post("/v1/completions", content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"
  assert server.complete(max_tokens=2).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
  monkeypatch.setattr(http, "BODY_SECONDS", 0.1)
  connection = raw(server, post_head(100), b'{"model"')
  assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
  connection.close()


def test_a_body_that_is_broken_off_harms_nobody(server):
  raw(server, post_head(100), b'{"model"').close()
  assert server.complete(max_tokens=2).status_code == 200
  assert 'status="500"' not in server.client.get("/metrics").text


def test_headers_are_bounded(server):
  connection = raw(server, "GET /health HTTP/1.1\nhost: x\nx: " + "a" * 20_000)
  assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
  connection.close()


def test_without_a_template_there_is_no_chat(scripted, serve):
  server = serve(scripted(), chat=False)
  response = server.client.post(
    "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
  )
  assert response.status_code == 400 and error_of(response)["code"] == "no_chat_template"
  assert server.complete(max_tokens=2).status_code == 200


def test_before_it_is_ready_it_is_healthy_and_refuses(scripted, serve):
  scheduler = Scheduler(scripted())
  server = serve(scheduler)
  assert server.client.get("/health").status_code == 200
  for response in (server.client.get("/ready"), server.complete()):
    assert response.status_code == 503 and response.headers["retry-after"] == "5"
    assert error_of(response)["code"] == "not_ready"
  assert server.metric("ready") == 0
  scheduler.start()
  assert server.client.get("/ready").status_code == 200 and server.metric("ready") == 1
  assert scheduler.drain(5)
  assert server.client.get("/ready").status_code == 503


def test_the_queue_is_bounded_exactly(scripted, serve):
  """Slots + queue + k requests: k are turned away, the others finish."""
  engine = scripted(slots=2, queue_limit=3)
  server = serve(engine)
  engine.gate.clear()
  with ThreadPoolExecutor(9) as pool:
    answers = [pool.submit(server.complete, max_tokens=6) for _ in range(9)]
    end = time.monotonic() + 10
    while sum(answer.done() for answer in answers) < 4:
      assert time.monotonic() < end
      time.sleep(0.01)
    assert server.metric("requests_waiting") + server.metric("slots_used") == 5
    engine.gate.set()
    responses = [answer.result() for answer in answers]
  refused = [response for response in responses if response.status_code == 429]
  assert sorted(response.status_code for response in responses) == [200] * 5 + [429] * 4
  for response in refused:
    assert int(response.headers["retry-after"]) >= 1 and error_of(response)["type"] == "rate_limit_error"
  assert 'http_responses_total{route="/v1/completions",status="429"} 4.0' in server.client.get("/metrics").text


# Clients that leave, and readers that do not read


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("when", ["queued", "prefill", "decode"])
def test_a_client_that_goes_away_frees_its_slot_within_a_chunk(scripted, serve, stream, when):
  engine = scripted(slots=1, prefill_chunk=16, context=4000, max_logprobs=5)
  server = serve(engine)
  engine.seconds = 0.01
  if when == "queued":
    first = raw_completion(server, max_tokens=3000)
    server.wait_until(lambda stats: stats.slots_used == 1)
  prompt = [1] * (3900 if when == "prefill" else 3)
  client = raw_completion(server, prompt=prompt, max_tokens=90 if when == "prefill" else 3000, stream=stream)
  if when == "queued":
    server.wait_until(lambda stats: stats.queued == 1)
  elif when == "prefill":
    server.wait_until(lambda stats: stats.cache_used > 16)
  else:
    server.wait_until(lambda stats: stats.decode_chunks > 2)
  client.close()
  if when == "queued":
    server.wait_until(lambda stats: stats.queued == 0, 1)
    assert server.scheduler.stats.slots_used == 1
    first.close()
  server.wait_until(lambda stats: stats.slots_used == 0, 1)
  assert len(engine.fills) < 3900 / 16 and server.scheduler.stats.decode_chunks < 3000 / 4 / 2
  gone = 2 if when == "queued" else 1
  assert f'requests_finished_total{{reason="cancelled"}} {gone}.0' in server.client.get("/metrics").text


def test_a_slow_reader_stalls_nobody_and_holds_no_slot(scripted, serve):
  """It does not read at all: the tokens wait in the server, bounded by max_tokens, and the slot goes on."""
  engine = scripted(context=10_000, slots=2)
  server = serve(engine)
  slow = raw_completion(server, max_tokens=9_000, stream=True, logprobs=5)
  began = time.monotonic()
  server.wait_until(lambda stats: stats.slots_used == 1)
  assert all(server.complete(max_tokens=20).status_code == 200 for _ in range(5))
  assert time.monotonic() - began < 10
  server.wait_until(lambda stats: stats.slots_used == 0, 30)
  slow.close()


def test_a_request_has_a_deadline(scripted, serve):
  engine = scripted(context=10_000)
  engine.seconds = 0.02
  server = serve(engine, request_seconds=0.3)
  response = server.complete(max_tokens=9000)
  assert response.status_code == 504 and error_of(response)["code"] == "timeout"
  *_, last = events_of(server.complete(max_tokens=9000, stream=True).text)
  assert last["error"]["message"] == "the request took longer than 0.3 s"
  server.wait_until(lambda stats: stats.slots_used == 0, 1)
  assert 'reason="cancelled"} 2.0' in server.client.get("/metrics").text


def test_the_deadline_holds_for_one_that_does_not_read(scripted, serve, monkeypatch):
  monkeypatch.setattr(http, "_FAREWELL_SECONDS", 0.1)
  engine = scripted(context=400_000)
  server = serve(engine, request_seconds=1.0)
  slow = raw_completion(server, max_tokens=390_000, stream=True)
  server.wait_until(lambda stats: stats.slots_used == 1)
  server.wait_until(lambda stats: stats.slots_used == 0, 5)
  assert 'reason="cancelled"} 1.0' in server.client.get("/metrics").text
  slow.close()


# Faults


@pytest.mark.parametrize("method", ["fill", "begin", "decode"])
def test_a_step_that_fails_is_a_500_and_the_next_request_is_served(scripted, serve, quiet, method):
  engine = scripted()
  server = serve(engine)
  engine.failing.add(method)
  response = server.complete(max_tokens=9)
  error = error_of(response)
  assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "step_failed")
  assert error["message"] == f"a step of the model failed: RuntimeError: {method} failed"
  assert server.complete(max_tokens=9).status_code == 200 and server.client.get("/health").status_code == 200
  assert server.metric("step_faults_total") == 1


def test_a_stream_that_fails_midway_ends_with_the_error(scripted, serve, quiet):
  engine = scripted(context=10_000)
  engine.seconds = 0.01
  server = serve(engine)
  with server.client.stream(
    "POST", "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 9000, "stream": True}
  ) as response:
    parts = response.iter_text()
    text = next(parts)
    engine.failing.add("decode")
    text += "".join(parts)
  *_, last = events_of(text)
  assert response.status_code == 200 and "decode failed" in last["error"]["message"]


def test_after_too_many_faults_it_is_unhealthy_and_says_why(scripted, serve, quiet):
  engine = scripted(max_faults=2)
  server = serve(engine)
  for _ in range(2):
    engine.failing.add("decode")
    assert server.complete(max_tokens=9).status_code == 500
  for response in (server.client.get("/health"), server.client.get("/ready"), server.complete()):
    assert response.status_code == 503 and "decode failed" in error_of(response)["message"]


def test_what_is_our_own_fault_is_a_500_without_a_trace(server, quiet, monkeypatch):
  def broken(*_):
    raise KeyError("secret")

  monkeypatch.setattr(http, "prepare", broken)
  response = server.complete()
  assert response.status_code == 500 and error_of(response)["message"] == "internal error"
  monkeypatch.undo()
  assert server.complete(max_tokens=2).status_code == 200


def test_draining_finishes_what_is_in_flight_and_refuses_the_rest(scripted, serve):
  engine = scripted()
  server = serve(engine)
  engine.gate.clear()
  with ThreadPoolExecutor(6) as pool:
    answers = [pool.submit(server.complete, max_tokens=9, stream=i % 2 == 0) for i in range(5)]
    server.wait_until(lambda stats: stats.slots_used + stats.queued == 5)
    drained = pool.submit(server.scheduler.drain, 20)
    while server.client.get("/ready").status_code == 200:
      time.sleep(0.01)
    refused = server.complete()
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    engine.gate.set()
    assert [answer.result().status_code for answer in answers] == [200] * 5 and drained.result()


# A crowd


def test_a_hundred_clients_with_cancels_garbage_and_slow_readers(scripted, serve, script):
  """Each of those who stay gets its whole text; those who leave free their slots; nothing else happens."""
  engine = scripted(slots=8, queue_limit=200, context=4000)
  engine.seconds = 0.002
  server = serve(engine)
  tokens = server.tokenizer.encode(script, add_special_tokens=False) * 4
  rng = random.Random(11)
  plans = [(rng.choice(["whole", "stream", "leave", "garbage", "slow"]), rng.randint(1, 100)) for _ in range(100)]

  async def one(client, kind, count):
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 3000 if kind == "leave" else count}
    if kind == "garbage":
      response = await client.post("/v1/completions", json=body | {"n": -1})
      return response.status_code == 400
    if kind == "whole":
      response = await client.post("/v1/completions", json=body)
      return response.json()["choices"][0]["text"] == server.tokenizer.decode(tokens[:count])
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
      text = ""
      async for part in response.aiter_text():
        text += part
        if kind == "leave":
          return True
        if kind == "slow":
          await asyncio.sleep(0.02)
    pieces = [event["choices"][0]["text"] for event in events_of(text)[:-1]]
    return "".join(pieces) == server.tokenizer.decode(tokens[:count])

  async def crowd():
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
      return await asyncio.gather(*(one(client, kind, count) for kind, count in plans))

  assert asyncio.run(crowd()) == [True] * 100
  server.wait_until(lambda stats: stats.slots_used == stats.queued == 0)
  page = server.client.get("/metrics").text
  kinds = [kind for kind, _ in plans]
  finished = {
    reason: int(float(page.split(f'requests_finished_total{{reason="{reason}"}} ')[1].split("\n")[0]))
    for reason in ("stop", "length", "cancelled", "error")
  }
  left = kinds.count("leave")
  assert finished == {"stop": 0, "length": 100 - kinds.count("garbage") - left, "cancelled": left, "error": 0}
  assert server.metric("recompilations_total") == 0 and threading.active_count() < 60
