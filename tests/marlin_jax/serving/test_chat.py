# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from marlin_jax.serving.chat import ChatTemplate
from marlin_jax.tokenizer import Tokenizer

TALK = [{"role": "system", "content": "Be <b>."}, {"role": "user", "content": "Hi"}]


def of_files(tokenizer, **files):
  """The template of a tokenizer with these files beside it; __ stands for the dot of a name."""
  others = {name.replace("__", "."): text for name, text in files.items()}
  return ChatTemplate.of_tokenizer(Tokenizer({"tokenizer.json": tokenizer.file("tokenizer.json")} | others))


def test_the_template_of_a_checkpoint_makes_the_prompt(tokenizer):
  text = ChatTemplate.of_tokenizer(tokenizer).render(TALK)
  assert text == "<s><|system|>Be <b>.</s><|user|>Hi</s><|assistant|>"
  ids = tokenizer.encode(text, add_special_tokens=False)
  assert ids.count(tokenizer.token_id("<s>")) == 1  # what the template writes is not added again


def test_the_file_goes_before_the_config_and_the_default_is_picked(tokenizer):
  one = json.dumps({"chat_template": "one"})
  named = json.dumps({"chat_template": [{"name": "x", "template": "x"}, {"name": "default", "template": "two"}]})
  assert of_files(tokenizer, tokenizer_config__json=one).render([]) == "one"
  assert of_files(tokenizer, tokenizer_config__json=named).render([]) == "two"
  assert of_files(tokenizer, tokenizer_config__json=one, chat_template__jinja="three").render([]) == "three"
  assert of_files(tokenizer) is None and of_files(tokenizer, tokenizer_config__json="{}") is None


def test_special_tokens_come_as_strings_whichever_way_they_are_written(tokenizer):
  config = json.dumps({"bos_token": {"content": "<s>", "lstrip": False}, "pad_token": None})
  special = json.dumps({"eos_token": "</s>"})
  files = dict(chat_template__jinja="{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}")
  made = of_files(tokenizer, tokenizer_config__json=config, special_tokens_map__json=special, **files)
  assert made.render([]) == "<s>|</s>|False"


@pytest.mark.parametrize(
  "source, text",
  [
    ("{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n{{ m.content }}\n{% endfor %}", "Hi\n"),
    ("{{ messages[0]['content'] | tojson }}", '"Be <b>."'),
    ("{{ messages[1] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "Hi"\n}'),
    ("{{ strftime_now('%Y') | length }}", "4"),
    ("{{ messages[1].content.strip().upper() }}{{ 'x' if add_generation_prompt }}", "HIx"),
  ],
)
def test_templates_find_what_transformers_gives_them(source, text):
  assert ChatTemplate(source, {}).render(TALK) == text


@pytest.mark.parametrize(
  "source, message",
  [
    ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
    ("{{ messages.__class__.__mro__ }}", "refuses these messages"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "refuses these messages"),
    ("{{ cycler.__init__.__globals__.os.system('true') }}", "refuses these messages"),
    ("{% set _ = messages.append(1) %}", "refuses these messages"),
    ("{% for i in range(10000000) %}{% endfor %}", "refuses these messages"),
    ("{% include '/etc/passwd' %}", "refuses these messages"),
    ("{{ messages[9].content + 1 }}", "refuses these messages"),
    ("{{ 1 / 0 }}", "refuses these messages"),
  ],
)
def test_a_template_that_fails_or_reaches_out_of_its_sandbox_is_an_error(source, message):
  with pytest.raises(ValueError, match=message):
    ChatTemplate(source, {}).render(TALK)


def test_what_is_no_template_is_an_error_at_once():
  with pytest.raises(ValueError, match="is no jinja2 template"):
    ChatTemplate("{% for %}", {})
