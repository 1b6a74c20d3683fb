# SPDX-License-Identifier: Apache-2.0
"""A conversation as a prompt, by the chat template that comes with the tokenizer.

The template is code from a checkpoint. It runs in jinja2's sandbox, with what transformers gives it and nothing more.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from marlin_jax.tokenizer import Tokenizer

# What transformers passes to a template beside the messages.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
  """The chat template of a tokenizer."""

  def __init__(self, source: str, special_tokens: Mapping[str, str]):
    """
    Raises:
      ValueError: the source is no template.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateError as error:
      raise ValueError(f"the tokenizer's chat template is no jinja2 template: {error}") from None
    self._special_tokens = dict(special_tokens)

  @classmethod
  def of_tokenizer(cls, tokenizer: Tokenizer) -> "ChatTemplate | None":
    """The template in chat_template.jinja or tokenizer_config.json; None if there is none.

    Raises:
      ValueError: it is no template.
    """
    config = json.loads(tokenizer.file("tokenizer_config.json") or "{}")
    source = tokenizer.file("chat_template.jinja") or config.get("chat_template")
    if isinstance(source, list):  # several by name
      source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not source:
      return None
    special = json.loads(tokenizer.file("special_tokens_map.json") or "{}") | config
    tokens = {name: special[name] for name in _SPECIAL_TOKENS if special.get(name) is not None}
    return cls(source, {name: t["content"] if isinstance(t, dict) else t for name, t in tokens.items()})

  def render(self, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt, up to where the assistant's answer begins; it holds its special tokens, so none are to be added.

    Raises:
      ValueError: the template refuses these messages, or fails on them.
    """
    try:
      return self._template.render(
        messages=[dict(message) for message in messages], add_generation_prompt=True, **self._special_tokens
      )
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
      raise ValueError(f"the chat template refuses these messages: {error}") from None


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def _now(format: str) -> str:
  return datetime.datetime.now().strftime(format)


def _to_json(value: Any, indent: int | None = None) -> str:
  # jinja2's own filter escapes HTML.
  return json.dumps(value, ensure_ascii=False, indent=indent)
