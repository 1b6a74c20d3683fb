# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax serve` as a process, on the model that ships: start, answers, SIGTERM, exit status, the port again."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from marlin_jax import load_model
from marlin_jax.cli import main
from marlin_jax.demo import model_path

ROOT = pathlib.Path(__file__).parents[3]
PROMPT = "import os\nimport "
DATA = ROOT / "tests" / "data"


class Process:
  """A running `marlin-jax serve`, and the lines it has printed."""

  def __init__(self, *arguments, cache):
    command = [sys.executable, "-m", "marlin_jax.cli", "serve", *map(str, arguments)]
    environment = os.environ | {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      # The second start finds what the first one compiled.
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    self.process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    self.url = re.search(r"http://\S+?:\d+", self.line())[0]

  def line(self):
    return self.process.stdout.readline()

  def terminate(self):
    self.process.send_signal(signal.SIGTERM)

  def end(self):
    """(exit status, the rest of stdout, stderr)"""
    out, err = self.process.communicate(timeout=60)
    return self.process.returncode, out, err


@contextlib.contextmanager
def serve(*arguments, cache):
  process = Process(*arguments, cache=cache)
  try:
    yield process
  finally:
    if process.process.poll() is None:
      process.process.kill()
      process.process.communicate()
    for pipe in (process.process.stdout, process.process.stderr):
      pipe.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("compiled")


def test_a_life_of_the_server(cache):
  """Two lives, rather: in the first a drain, in the second a restart on the same port."""
  options = ("--context", 32, "--slots", 2)
  with serve(model_path(), "--port", 0, *options, cache=cache) as process:
    with httpx.Client(base_url=process.url) as http:
      # It answers from the first line on, and takes requests from the second.
      assert http.get("/health").json() == {"status": "ok"}
      assert "ready after" in process.line()
      assert http.get("/ready").json() == {"status": "ready"}
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client:
      (model,) = client.models.list().data
      asked = dict(model=model.id, prompt=PROMPT, temperature=0, max_tokens=24)
      text = client.completions.create(**asked).choices[0].text
      assert len(text) > 10
      with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(model=model.id, messages=[{"role": "user", "content": "Hi"}])
      # SIGTERM while a stream is under way: it comes to its end, and new requests find nobody.
      stream = client.completions.create(**asked, stream=True)
      pieces = [next(stream).choices[0].text]
      process.terminate()
      pieces += [chunk.choices[0].text for chunk in stream]
      assert "".join(pieces) == text
    status, out, err = process.end()
    assert (status, out) == (0, "stopping\n"), err
    assert PROMPT not in err and "Traceback" not in err
    port = process.url.rpartition(":")[2]
  with pytest.raises(ConnectionRefusedError):
    socket.create_connection(("127.0.0.1", int(port)), timeout=5)
  with serve(model_path(), "--port", port, *options, "--api-key", "secret", cache=cache) as process:
    assert process.url.endswith(f":{port}") and "ready after" in process.line()
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="secret", max_retries=0) as client:
      assert client.completions.create(**asked).choices[0].text == text
    metrics = httpx.get(f"{process.url}/metrics", headers={"authorization": "Bearer secret"}).text
    assert "marlin_jax_recompilations_total 0.0" in metrics
    assert httpx.get(f"{process.url}/health").status_code == 401
    process.process.send_signal(signal.SIGINT)
    assert process.end()[0] == 0


def test_sigterm_before_it_is_ready_ends_it_at_once(tmp_path):
  with serve(model_path(), "--port", 0, "--context", 32, cache=tmp_path) as process:
    began = time.monotonic()
    process.terminate()
    status, _, err = process.end()
    assert status == 0 and time.monotonic() - began < 20 and "Traceback" not in err


def test_a_device_that_is_lost_ends_the_process_with_status_1(monkeypatch, capsys, quiet, scripted, tokenizer):
  """In this process, with an engine that fails: what `serve` returns is the exit status."""
  from marlin_jax.serving import server

  engine = scripted(max_faults=1)
  monkeypatch.setattr(server, "Engine", lambda model, config: engine)
  listener = server._bind("127.0.0.1", 0)
  url = f"http://127.0.0.1:{listener.getsockname()[1]}"
  answers = []

  def ask():
    with httpx.Client(base_url=url, timeout=30) as client:
      while True:
        with contextlib.suppress(httpx.ConnectError):
          if client.get("/ready").status_code == 200:
            break
        time.sleep(0.02)
      engine.failing.add("decode")
      answers.append(client.post("/v1/completions", json={"model": "tiny", "prompt": "Hello", "max_tokens": 9}))

  asking = threading.Thread(target=ask)
  asking.start()
  monkeypatch.setattr(server, "load_model", lambda folder: model_with(tokenizer))
  monkeypatch.setattr(server, "_bind", lambda host, port: listener)
  monkeypatch.setattr(server, "find_folder", lambda folder: pathlib.Path("tiny"))
  assert server.serve("tiny") == 1
  asking.join(10)
  assert answers[0].status_code == 500 and "decode failed" in answers[0].json()["error"]["message"]
  assert "marlin-jax: a step of the model failed: RuntimeError: decode failed" in capsys.readouterr().err


def model_with(tokenizer):
  model = load_model(DATA / "llama-bf16")
  model.tokenizer = tokenizer
  return model


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["no/such/folder"], "no/such/folder"),
    ([str(DATA / "qwen2-bf16")], "qwen2-bf16 has no tokenizer.json, so there is no text to serve"),
    ([str(model_path()), "--slots", "0"], "slots=0 must be at least 1"),
    ([str(model_path()), "--port", "70000"], "port 70000 must be in 0 .. 65535"),
    ([str(model_path()), "--host", "256.0.0.1"], "256.0.0.1, port 8000"),
  ],
)
def test_what_cannot_be_served_is_one_sentence_and_status_2(arguments, message, capsys):
  assert main(["serve", *arguments]) == 2
  err = capsys.readouterr().err
  assert message in err and err.startswith("marlin-jax: ") and err.count("\n") == 1


def test_a_port_in_use_is_named_before_a_model_is_loaded(capsys):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    assert main(["serve", "no/such/folder", "--port", str(port)]) == 2
  assert f"127.0.0.1, port {port}: [Errno 98] Address already in use" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install():
  """In a process of its own, where starlette cannot be imported; the package itself does not need it."""
  program = (
    "import sys; sys.modules['starlette'] = sys.modules['uvicorn'] = None\n"
    "import marlin_jax\nfrom marlin_jax.cli import main\nsys.exit(main(['serve', 'x']))"
  )
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
  assert done.returncode == 2
  said = r"marlin-jax: serve needs \w+: pip install 'marlin_jax\[serve\]' brings all it needs\n"
  assert re.fullmatch(said, done.stderr)


def test_the_key_may_come_from_the_environment(monkeypatch):
  from marlin_jax.serving import server

  asked = []
  monkeypatch.setattr(server, "serve", lambda folder, **options: asked.append(options["api_key"]) or 0)
  monkeypatch.setenv("MARLIN_JAX_API_KEY", "from outside")
  assert main(["serve", "x"]) == 0 and main(["serve", "x", "--api-key", "given"]) == 0
  monkeypatch.setenv("MARLIN_JAX_API_KEY", "")
  assert main(["serve", "x"]) == 0
  assert asked == ["from outside", "given", None]
