# SPDX-License-Identifier: Apache-2.0
"""What Locust does to a server: streamed completions that arrive at random, however long the earlier ones take.

`marlin_jax.bench.load` runs it with `locust --locustfile` and LOAD, a JSON object with the fields of its Load.
"""

import json
import os
import random
import time

import gevent
import requests
from locust import User, events, task

_LOAD = json.loads(os.environ["LOAD"])
_DRAW = random.Random(0)
_UNDER_WAY = []
_RESULTS = []


class Clients(User):
  """All clients: a Poisson process."""

  def wait_time(self) -> float:
    """Seconds to the next arrival."""
    return _DRAW.expovariate(_LOAD["rate"])

  @task
  def arrive(self) -> None:
    """One more client, which nobody waits for."""
    prompt = [_DRAW.randrange(_LOAD["vocab_size"]) for _ in range(_LOAD["prompt_tokens"])]
    # Leaves after so many seconds of its answer.
    patience = _DRAW.expovariate(1.0) if _DRAW.random() < _LOAD["cancelled"] else None
    _UNDER_WAY.append(gevent.spawn(self._request, prompt, patience))

  def _request(self, prompt: list[int], patience: float | None) -> None:
    body = {
      "model": _LOAD["model"],
      "prompt": prompt,
      "max_tokens": _LOAD["new_tokens"],
      "temperature": 0,
      "ignore_eos": True,
      "stream": True,
      "stream_options": {"include_usage": True},
    }
    result, began, size = {"outcome": "failed", "status": 0}, time.perf_counter(), 0
    try:
      with requests.post(f"{_LOAD['url']}/v1/completions", json=body, stream=True, timeout=300) as response:
        result["status"] = response.status_code
        if response.status_code == 429:
          result["outcome"] = "refused"
        elif response.ok:
          result.update(_read(response, began, patience))
        size = result.get("tokens", 0)
    except requests.RequestException as error:
      result["reason"] = type(error).__name__
    _RESULTS.append(result)
    self.environment.events.request.fire(
      request_type="POST",
      name=result["outcome"],
      response_time=(time.perf_counter() - began) * 1e3,
      response_length=size,
      exception=RuntimeError(str(result)) if result["outcome"] == "failed" else None,
      context={},
    )


def _read(response: requests.Response, began: float, patience: float | None) -> dict:
  """The stream's outcome; times are the client's, TPOT is (latency - TTFT) / (tokens - 1)."""
  first = last = tokens = None
  for line in response.iter_lines():
    now = time.perf_counter()
    if not line.startswith(b"data: "):
      continue
    if line == b"data: [DONE]":
      return dict(outcome="answered", ttft=first - began, tpot=(last - first) / max(1, tokens - 1), tokens=tokens)
    event = json.loads(line[6:])
    if "error" in event:
      return dict(reason=event["error"]["message"])
    if event.get("usage"):
      tokens = event["usage"]["completion_tokens"]
    if event["choices"] and event["choices"][0]["text"]:
      last = now
      first = first or now
      if patience is not None and now - first > patience:
        return dict(outcome="cancelled")
  return dict(reason="the stream ended early")


@events.test_stop.add_listener
def _finish(**_) -> None:
  gevent.joinall(_UNDER_WAY)
  with open(_LOAD["results"], "w") as file:
    json.dump(_RESULTS, file)
