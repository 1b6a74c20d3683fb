# SPDX-License-Identifier: Apache-2.0
"""Load on a server of the OpenAI API, made by Locust in a process of its own, and what its clients saw."""

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# Looked for and not imported, because it patches the standard library.
if importlib.util.find_spec("locust") is None:
  raise ModuleNotFoundError("load on a server is made by locust", name="locust")

_LOCUSTFILE = Path(__file__).with_name("locustfile.py")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Load:
  """Greedy streamed completions of a random prompt, that arrive as a Poisson process.

  Attributes:
    url: of the server, without a path.
    model: its name there.
    vocab_size: what the prompt's tokens are drawn from.
    rate: requests a second.
    seconds: how long they arrive; those under way at the end are waited for.
    prompt_tokens, new_tokens: of every request; EOS ends none.
    cancelled: of all requests, the part whose client leaves, on the average a second after its first token.
  """

  url: str
  model: str
  vocab_size: int
  rate: float
  seconds: int
  prompt_tokens: int
  new_tokens: int
  cancelled: float = 0.0

  def __post_init__(self):
    for field in ("rate", "seconds", "prompt_tokens", "new_tokens"):
      if not getattr(self, field) > 0:
        raise ValueError(f"{field}={getattr(self, field)} must be positive")
    if not 0 <= self.cancelled <= 1:
      raise ValueError(f"cancelled={self.cancelled} must be in 0 .. 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
  """What became of the requests.

  Attributes:
    answered, refused, cancelled: requests that got all their tokens; status 429; that their client left.
    failures: why the others got neither.
    ttft: of those answered, seconds from the request to its first token.
    tpot: of those answered, (latency - TTFT) / (tokens - 1), in seconds.
  """

  answered: int
  refused: int
  cancelled: int
  failures: tuple[str, ...]
  ttft: tuple[float, ...]
  tpot: tuple[float, ...]


def apply_load(load: Load) -> Outcome:
  """Runs Locust until the last request has ended.

  Raises:
    RuntimeError: it failed.
  """
  with tempfile.TemporaryDirectory() as folder:
    results = Path(folder) / "results.json"
    environment = os.environ | {"LOAD": json.dumps(dataclasses.asdict(load) | {"results": str(results)})}
    command = [sys.executable, "-m", "locust", "--locustfile", str(_LOCUSTFILE), "--headless", "--users", "1"]
    command += ["--run-time", str(load.seconds), "--only-summary", "--exit-code-on-error", "0", "--stop-timeout", "600"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode or not results.is_file():
      raise RuntimeError(f"locust failed: {run.stderr.strip()[-500:]}")
    requests = json.loads(results.read_text())
  by_outcome = {name: [r for r in requests if r["outcome"] == name] for name in ("answered", "refused", "cancelled")}
  return Outcome(
    **{name: len(of_it) for name, of_it in by_outcome.items()},
    failures=tuple(r.get("reason", f"status {r['status']}") for r in requests if r["outcome"] == "failed"),
    ttft=tuple(r["ttft"] for r in by_outcome["answered"]),
    tpot=tuple(r["tpot"] for r in by_outcome["answered"]),
  )


def percentile(values: tuple[float, ...], percent: int) -> float:
  """The value that `percent` of them do not exceed; NaN of none."""
  if len(values) < 2:
    return values[0] if values else float("nan")
  return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
