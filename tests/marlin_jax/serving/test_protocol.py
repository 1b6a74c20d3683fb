# SPDX-License-Identifier: Apache-2.0
"""What a body may hold: each refusal names its field and repeats nothing of what was sent."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlin_jax.serving.protocol import ApiError, ChatCompletionRequest, CompletionRequest, parse

COMPLETION = {"model": "m", "prompt": "secret"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "secret"}]}
BIG = 10**40

# (body, the field that is named or None, a part of the message); a dict is a change of a good body.
BAD_BODIES = [
  (b"", None, "not valid JSON"),
  (b"{", None, "not valid JSON"),
  (b"\xff\xfe", None, "not valid JSON"),
  (b'{"model": "m", "prompt": "\\ud800"}', None, "not valid JSON"),
  (b"[" * 100_000, None, "not valid JSON"),
  (b"[]", None, "must be a JSON object"),
  (b"null", None, "must be a JSON object"),
  (b'"text"', None, "must be a JSON object"),
  (b'{"model": "m"}', "prompt", "is missing"),
  (b'{"prompt": "a"}', "model", "is missing"),
  ({"model": 5}, "model", "valid string"),
  ({"model": "m" * 300}, "model", "at most 256"),
  ({"prompt": None}, "prompt", "must be a string"),
  ({"prompt": 5}, "prompt", "must be a string"),
  ({"prompt": {}}, "prompt", "must be a string"),
  ({"prompt": ""}, "prompt", "must not be empty"),
  ({"prompt": []}, "prompt", "not empty"),
  ({"prompt": [""]}, "prompt", "must not be empty"),
  ({"prompt": [[]]}, "prompt", "must not be empty"),
  ({"prompt": ["a", 5]}, "prompt", "must be a string"),
  ({"prompt": [1.5]}, "prompt", "must be a string"),
  ({"prompt": [True]}, "prompt", "must be a string"),
  ({"prompt": [[1, "a"]]}, "prompt", "must be a string"),
  ({"prompt": ["a"] * 9}, "prompt", "at most 8 items"),
  ({"prompt": ["a"] * 5, "n": 2}, None, "5 prompts with n=2: together at most 8"),
  ({"n": 0}, "n", "greater than or equal to 1"),
  ({"n": 9}, "n", "less than or equal to 8"),
  ({"n": BIG}, "n", ""),
  ({"n": 1.5}, "n", "integer"),
  ({"n": True}, "n", "integer"),
  ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
  ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
  ({"max_tokens": "5"}, "max_tokens", "integer"),
  ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
  ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
  ({"temperature": "1"}, "temperature", "number"),
  (b'{"model": "m", "prompt": "secret", "temperature": NaN}', "temperature", "finite"),
  (b'{"model": "m", "prompt": "secret", "top_p": Infinity}', "top_p", "finite"),
  (b'{"model": "m", "prompt": "secret", "temperature": 1e999}', "temperature", ""),
  ({"top_p": 0}, "top_p", "greater than 0"),
  ({"top_p": 1.01}, "top_p", "less than or equal to 1"),
  ({"top_k": 0}, "top_k", "greater than or equal to 1"),
  ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
  ({"seed": "a"}, "seed", "integer"),
  ({"seed": BIG}, "seed", ""),
  ({"stop": ""}, "stop.0", "at least 1 character"),
  ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
  ({"stop": ["a" * 129]}, "stop.0", "at most 128"),
  ({"stop": [5]}, "stop.0", "string"),
  ({"stop": 5}, "stop", "array"),
  ({"stream": "yes"}, "stream", "boolean"),
  ({"stream_options": {"include_usage": True}}, None, "stream_options is for stream=true only"),
  ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more", "is not supported"),
  ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
  ({"logprobs": -1}, "logprobs", "greater than or equal to 0"),
  ({"logprobs": True}, "logprobs", "integer"),
  ({"echo": True}, "echo", "not supported; only False"),
  ({"best_of": 2}, "best_of", "not supported; only 1"),
  ({"suffix": "x"}, "suffix", "not supported"),
  ({"presence_penalty": 0.5}, "presence_penalty", "not supported; only 0"),
  ({"frequency_penalty": -1}, "frequency_penalty", "not supported; only 0"),
  ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
  ({"user": 5}, "user", "string"),
  ({"prompt_embeds": "AAAA"}, "prompt_embeds", "is not supported"),
  ({"guided_regex": ".*"}, "guided_regex", "is not supported"),
  ({"messages": []}, "messages", "is not supported"),
  ({"x" * 1000: 1}, "x" * 64, "is not supported"),
]
BAD_CHATS = [
  ({"messages": []}, "messages", "at least 1 item"),
  ({"messages": "hi"}, "messages", "array"),
  ({"messages": ["hi"]}, "messages.0", "object"),
  ({"messages": [{"content": "a"}]}, "messages.0.role", "is missing"),
  ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
  ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'system', 'user' or 'assistant'"),
  ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", ""),
  ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages.0.name", "is not supported"),
  (
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    "messages.0.content",
    "",
  ),
  ({"messages": [{"role": "user", "content": "a"}] * 1025}, "messages", "at most 1024"),
  ({"prompt": "a"}, "prompt", "is not supported"),
  ({"tools": []}, "tools", "is not supported"),
  ({"tools": [{"type": "function", "function": 5}]}, "tools", "is not supported"),
  ({"tool_choice": "auto"}, "tool_choice", "is not supported"),
  ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
  ({"chat_template": "{{ 1 }}"}, "chat_template", "is not supported"),
  ({"logprobs": 1}, "logprobs", "boolean"),
  ({"top_logprobs": 2}, None, "top_logprobs is for logprobs=true only"),
  ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "less than or equal to 5"),
  ({"max_tokens": 3, "max_completion_tokens": 4}, None, "differ"),
  ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
]


def refusal(kind, body):
  with pytest.raises(ApiError) as caught:
    parse(kind, body)
  return caught.value


def check(error, field, message):
  assert error.status == 400 and error.body()["error"]["type"] == "invalid_request_error"
  if error.param is None:
    assert field is None
  else:
    assert error.param == field or error.param.startswith(f"{field}."), error.param
    assert error.message.startswith(error.param)
  assert message in error.message
  assert "secret" not in error.message and len(error.message) < 300


@pytest.mark.parametrize("body, field, message", BAD_BODIES, ids=lambda value: str(value)[:40])
def test_bad_completions_are_refused_by_name(body, field, message):
  check(
    refusal(CompletionRequest, body if isinstance(body, bytes) else json.dumps(COMPLETION | body).encode()),
    field,
    message,
  )


@pytest.mark.parametrize("change, field, message", BAD_CHATS, ids=lambda value: str(value)[:40])
def test_bad_chats_are_refused_by_name(change, field, message):
  check(refusal(ChatCompletionRequest, json.dumps(CHAT | change).encode()), field, message)


@pytest.mark.parametrize(
  "prompt, prompts",
  [
    ("a", ["a"]),
    (["a", "b"], ["a", "b"]),
    ([1, 2], [[1, 2]]),
    ([[1], [2, 3]], [[1], [2, 3]]),
    (["a", [1]], ["a", [1]]),
  ],
)
def test_a_prompt_is_one_or_several(prompt, prompts):
  assert parse(CompletionRequest, json.dumps(COMPLETION | {"prompt": prompt}).encode()).prompt == prompts


def test_values_that_change_nothing_are_accepted():
  neutral = {
    "echo": False,
    "best_of": 1,
    "suffix": "",
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "logit_bias": {},
  }
  optional = {name for name in CompletionRequest.model_fields if name not in COMPLETION}
  assert parse(CompletionRequest, json.dumps(COMPLETION | dict.fromkeys(optional)).encode()).temperature is None
  assert parse(CompletionRequest, json.dumps(COMPLETION | neutral).encode()).echo is False


def test_the_text_of_a_message_may_come_in_parts():
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  body = CHAT | {"messages": [{"role": "user", "content": parts}]}
  assert parse(ChatCompletionRequest, json.dumps(body).encode()).messages[0].text == "ab"


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
  max_leaves=8,
)
FIELDS = sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields})


@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4) | JSON, raw=st.binary(max_size=20))
def test_whatever_comes_is_a_request_or_refused(body, raw):
  for kind, good in ((CompletionRequest, COMPLETION), (ChatCompletionRequest, CHAT)):
    for content in (json.dumps(good | body if isinstance(body, dict) else body).encode(), raw):
      try:
        assert isinstance(parse(kind, content), kind)
      except ApiError as error:
        assert error.status == 400
