# SPDX-License-Identifier: Apache-2.0
"""The `openai` client against `marlin-jax serve`: an answer at once, an answer as it comes, and eight at the same time.

    marlin-jax serve marlin_jax/demo/model                # in another terminal; wait for "ready"
    python examples/07_talk_to_the_server.py

The client needs `pip install openai`.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import openai

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--api-key", default="none", help="what the server was started with")
arguments = parser.parse_args()

with openai.OpenAI(base_url=arguments.url, api_key=arguments.api_key) as client:
  model = client.models.list().data[0].id

  answer = client.completions.create(model=model, prompt="class Stack:\n", max_tokens=24, temperature=0)
  print(f"--- {model}, {answer.usage.completion_tokens} tokens:\n{answer.choices[0].text}")

  print("--- as it comes, up to an empty line:")
  streamed = ""
  for chunk in client.completions.create(
    model=model, prompt="import os\n", max_tokens=48, temperature=0.7, seed=1, stop=["\n\n"], stream=True
  ):
    streamed += chunk.choices[0].text
    print(chunk.choices[0].text, end="", flush=True)

  # One decode step serves all of them, and each gets what it would get alone.
  def ask(_: int) -> str:
    request = client.completions.create(model=model, prompt="class Stack:\n", max_tokens=24, temperature=0)
    return request.choices[0].text

  with ThreadPoolExecutor(8) as pool:
    texts = list(pool.map(ask, range(8)))
  print(f"\n--- eight at once, all the same text as before: {set(texts) == {answer.choices[0].text}}")
