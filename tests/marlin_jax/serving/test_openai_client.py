# SPDX-License-Identifier: Apache-2.0
"""The `openai` client, unchanged, against a tiny model: what it gets is what `generate` gives, alone and in a crowd."""

import math
import pathlib
import runpy
from concurrent.futures import ThreadPoolExecutor

import jax
import openai
import pytest

from marlin_jax.serving import programs
from marlin_jax.text import generate

PROMPTS = ["Hello", "The quick brown fox", "def main():\n", "日本語 🙂", "a" * 60]
EXAMPLES = pathlib.Path(__file__).parents[3] / "examples"
compilations = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, duration, **_: compilations.append(event) if event.endswith("backend_compile_duration") else None
)


@pytest.fixture(scope="module")
def server(scheduler, model, serving):
  options = {"api_key": "key", "headers": {"authorization": "Bearer key"}}
  with serving(scheduler, model.tokenizer, eos_token_ids=model.config.eos_token_ids, **options) as server:
    yield server


@pytest.fixture(scope="module")
def client(server):
  with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0, timeout=60) as client:
    yield client


def complete(client, prompt="Hello", **options):
  asked = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
  return client.completions.create(**(asked | options))


def chat(client, content="Hello", **options):
  messages = [{"role": "user", "content": content}]
  return client.chat.completions.create(
    **(dict(model="tiny", messages=messages, max_completion_tokens=12, temperature=0) | options)
  )


def test_models(client):
  assert [model.id for model in client.models.list()] == ["tiny"]
  assert client.models.retrieve("tiny").owned_by == "marlin_jax"


def test_a_greedy_completion_is_what_generate_gives(client, model):
  answer = complete(client, PROMPTS[1])
  assert answer.choices[0].text == generate(model, PROMPTS[1], max_new_tokens=12)
  assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
  assert answer.usage.prompt_tokens == len(model.tokenizer.encode(PROMPTS[1]))


def test_a_drawn_completion_is_what_generate_gives(client, model):
  settings = dict(temperature=0.9, top_p=0.8, seed=7)
  text = generate(model, PROMPTS[1], max_new_tokens=12, repetition_penalty=1.2, **settings)
  answer = complete(client, PROMPTS[1], extra_body={"repetition_penalty": 1.2}, **settings)
  assert answer.choices[0].text == text


def test_token_ids_are_a_prompt_as_well(client, model):
  assert complete(client, model.tokenizer.encode("Hello")).choices[0].text == complete(client).choices[0].text


def test_a_chat_is_the_completion_of_its_template(client, tokenizer):
  prompt = tokenizer.encode("<s><|user|>Hello</s><|assistant|>", add_special_tokens=False)
  answer = chat(client)
  assert answer.choices[0].message.content == complete(client, prompt).choices[0].text
  assert answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"
  assert answer.usage.prompt_tokens == len(prompt)


def test_a_chat_may_fill_the_context(client):
  answer = chat(client, max_completion_tokens=None, extra_body={"ignore_eos": True})
  assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == 128


@pytest.mark.parametrize("seed", range(4))
def test_streamed_deltas_join_to_the_whole(client, seed):
  settings = dict(temperature=1.6, seed=seed, max_tokens=60)
  whole = complete(client, **settings)
  chunks = list(complete(client, stream=True, stream_options={"include_usage": True}, **settings))
  assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
  assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
  assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
  settings = dict(temperature=1.6, seed=seed, max_completion_tokens=60)
  whole, chunks = chat(client, **settings), list(chat(client, stream=True, **settings))
  assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
  assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)


def test_eos_ends_a_text_and_ignore_eos_does_not(client, server):
  """Drawn from an almost even distribution, one of the eight EOS tokens of 512 comes soon in some of the texts."""
  settings = dict(temperature=2, max_tokens=100)
  answers = [complete(client, seed=seed, **settings) for seed in range(6)]
  ended = [seed for seed, answer in enumerate(answers) if answer.choices[0].finish_reason == "stop"]
  assert ended and all(answers[seed].usage.completion_tokens < 100 for seed in ended)
  answer = complete(client, seed=ended[0], extra_body={"ignore_eos": True}, **settings)
  assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 100
  assert answer.choices[0].text.startswith(answers[ended[0]].choices[0].text)


def test_a_stop_string_is_not_in_the_text(client):
  whole = complete(client, max_tokens=60, extra_body={"ignore_eos": True}).choices[0].text
  stop = whole[len(whole) // 2 :][:3]
  before = whole[: whole.index(stop)]
  settings = dict(max_tokens=60, stop=stop, extra_body={"ignore_eos": True})
  answer = complete(client, **settings)
  assert (answer.choices[0].text, answer.choices[0].finish_reason) == (before, "stop")
  assert "".join(chunk.choices[0].text for chunk in complete(client, stream=True, **settings)) == before


def test_choices_draw_with_seeds_of_their_own(client):
  texts = [choice.text for choice in complete(client, n=3, temperature=1.2, seed=5).choices]
  assert len(set(texts)) == 3
  assert texts == [complete(client, temperature=1.2, seed=5 + i).choices[0].text for i in range(3)]
  unseeded = {complete(client, temperature=1.2).choices[0].text for _ in range(3)}
  assert len(unseeded) > 1


def test_logprobs_of_a_completion(client):
  settings = dict(logprobs=3, max_tokens=20, extra_body={"ignore_eos": True})
  answer = complete(client, **settings)
  said, text = answer.choices[0].logprobs, answer.choices[0].text
  assert len(said.tokens) == len(said.token_logprobs) == len(said.top_logprobs) == len(said.text_offset) == 20
  # Greedy: the chosen token is the most likely one.
  for logprob, top in zip(said.token_logprobs, said.top_logprobs, strict=True):
    assert logprob == max(top.values()) <= 0 and sum(map(math.exp, top.values())) <= 1.001
  assert said.text_offset == sorted(said.text_offset) and said.text_offset[-1] <= len(text)
  streamed = [chunk.choices[0].logprobs for chunk in complete(client, stream=True, **settings)]
  assert [token for part in streamed if part for token in part.tokens] == said.tokens


def test_logprobs_of_a_chat(client):
  extra = {"ignore_eos": True}
  answer = chat(client, logprobs=True, top_logprobs=2, extra_body=extra)
  content = answer.choices[0].logprobs.content
  assert len(content) == 12 and all(len(entry.top_logprobs) == 2 for entry in content)
  assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in content)
  assert len({bytes(entry.bytes) for entry in content}) > 3
  assert chat(client, logprobs=True, extra_body=extra).choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize(
  "options, error, message",
  [
    (dict(model="gpt-4"), openai.NotFoundError, "the model is 'tiny'"),
    (dict(max_tokens=127), openai.BadRequestError, "at most 128"),
    (dict(extra_body={"tools": []}), openai.BadRequestError, "tools is not supported"),
    (dict(n=9), openai.BadRequestError, "n: .* less than or equal to 8"),
  ],
)
def test_refusals_are_the_clients_own_exceptions(client, options, error, message):
  with pytest.raises(error, match=message):
    complete(client, **options)


def test_the_key_is_asked_for(server):
  with (
    openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
    pytest.raises(openai.AuthenticationError, match="API key"),
  ):
    complete(client)


def test_everybody_gets_in_a_crowd_what_he_gets_alone_and_nothing_compiles(client, server):
  """All that a request can ask for, at once: the programs that were compiled before the first are enough."""
  kinds = [
    dict(),
    dict(max_tokens=1),
    dict(temperature=1.1, seed=3),
    dict(temperature=0.8, seed=4, top_p=0.7),
    dict(temperature=0.8, seed=5, extra_body={"top_k": 3}),
    dict(extra_body={"repetition_penalty": 1.5}),
    dict(logprobs=5),
    dict(temperature=1.3, seed=6, logprobs=0, stop=["e"]),
    dict(n=2, temperature=1, seed=9),
    dict(max_tokens=50, extra_body={"ignore_eos": True}),
  ]
  asked = [(prompt, kind) for prompt in PROMPTS for kind in kinds]
  complete(client)
  start = server.scheduler.stats
  before, cached = len(compilations), programs.decode._cache_size()
  with ThreadPoolExecutor(16) as pool:
    crowd = list(pool.map(lambda pair: complete(client, pair[0], **pair[1]), asked))
  stats = server.scheduler.stats
  assert (stats.decoded_rows - start.decoded_rows) / (stats.decode_chunks - start.decode_chunks) > 1.2
  for (prompt, kind), answer in list(zip(asked, crowd, strict=True))[::3]:
    alone = complete(client, prompt, **kind)
    assert [choice.model_dump() for choice in answer.choices] == [choice.model_dump() for choice in alone.choices]
  assert server.metric("recompilations_total") == 0
  assert (len(compilations), programs.decode._cache_size()) == (before, cached)


def test_metrics_count_what_was_done(client, server):
  names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count")
  names += ("time_per_output_token_seconds_count", "request_seconds_count", "queue_seconds_count")
  before = {name: server.metric(name) for name in names}
  answer = complete(client, PROMPTS[3], extra_body={"ignore_eos": True})
  complete(client, PROMPTS[3], max_tokens=1)
  grown = {name: server.metric(name) - before[name] for name in names}
  tokens = 2 * answer.usage.prompt_tokens
  assert grown == dict(zip(names, (tokens, 13, 2, 1, 2, 2), strict=True))
  assert server.metric("kv_cache_usage_ratio") == server.metric("slots_used") == 0


def test_the_example_talks_to_the_server(server, monkeypatch, capsys):
  arguments = ["--url", f"{server.url}/v1", "--api-key", "key"]
  monkeypatch.setattr("sys.argv", ["07_talk_to_the_server.py", *arguments])
  names = runpy.run_path(str(EXAMPLES / "07_talk_to_the_server.py"), run_name="__main__")
  printed = capsys.readouterr().out
  assert "all the same text as before: True" in printed and names["streamed"] in printed
  assert names["answer"].choices[0].text and names["model"] == "tiny"
