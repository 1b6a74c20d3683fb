# SPDX-License-Identifier: Apache-2.0
"""The requests of the OpenAI API that are understood, field by field; whatever else a body holds is refused by name.

A field that a model cannot honour is worse than an error, so nothing is ignored but `user`, which says who asks. Fields
that clients send with a value that changes nothing are accepted with that value alone.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

MAX_CHOICES = 8  # prompts times n
MAX_STOP = 4
MAX_STOP_LENGTH = 128
MAX_LOGPROBS = 5
MAX_MESSAGES = 1024


class ApiError(Exception):
  """A refusal or failure, as the client is told it."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after: int | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

  def body(self) -> dict[str, Any]:
    """The error in OpenAI's shape."""
    kind = {429: "rate_limit_error", 401: "authentication_error"}.get(self.status)
    kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
    return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _only(*neutral: Any) -> AfterValidator:
  """Accepts what changes nothing."""

  def check(value: Any) -> Any:
    if value is not None and value not in neutral:
      raise ValueError(f"is not supported; only {neutral[0]!r} is accepted")
    return value

  return AfterValidator(check)


def _listed(value: Any) -> Any:
  return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
  """One prompt or several, each a string or token ids, as a list of prompts."""
  if isinstance(value, str):
    value = [value]
  if not isinstance(value, list) or not value:
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of those, and not empty")
  prompts = [value] if all(type(token) is int for token in value) else value
  for prompt in prompts:
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
      raise ValueError("must be a string, a list of strings, a list of token ids or a list of those")
    if not prompt:
      raise ValueError("must not be empty")
  return prompts


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class _Strict(BaseModel):
  model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
  """`include_usage`: a last chunk says how many tokens there were."""

  include_usage: bool | None = None


class _GenerationFields(_Strict):
  """What both endpoints have. None is the default, as if the field were left out."""

  model: Annotated[str, Field(max_length=256)]
  n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
  max_tokens: Annotated[int, Field(ge=1)] | None = None
  temperature: Annotated[float, Field(ge=0, le=2)] | None = None
  top_p: Annotated[float, Field(gt=0, le=1)] | None = None
  seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
  stop: Annotated[Annotated[list[StopString], Field(max_length=MAX_STOP)] | None, BeforeValidator(_listed)] = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  user: Annotated[str, Field(max_length=256)] | None = None
  presence_penalty: Annotated[float | None, _only(0)] = None
  frequency_penalty: Annotated[float | None, _only(0)] = None
  logit_bias: Annotated[dict[str, float] | None, _only({})] = None
  # Not OpenAI's; the `openai` client sends them by extra_body.
  top_k: Annotated[int, Field(ge=1)] | None = None
  repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
  ignore_eos: bool | None = None

  @model_validator(mode="after")
  def _check_stream_options(self) -> "_GenerationFields":
    if self.stream_options is not None and not self.stream:
      raise ValueError("stream_options is for stream=true only")
    return self


class CompletionRequest(_GenerationFields):
  """The body of /v1/completions."""

  prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts), Field(max_length=MAX_CHOICES)]
  logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
  echo: Annotated[bool | None, _only(False)] = None
  best_of: Annotated[int | None, _only(1)] = None
  suffix: Annotated[str | None, _only("")] = None

  @model_validator(mode="after")
  def _check_choices(self) -> "CompletionRequest":
    if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
      raise ValueError(f"{len(self.prompt)} prompts with n={self.n}: together at most {MAX_CHOICES} choices")
    return self


class TextPart(_Strict):
  """A part of a message; text is the only kind."""

  type: Literal["text"]
  text: str


class Message(_Strict):
  """A turn of the conversation."""

  role: Literal["system", "user", "assistant"]
  content: Annotated[str | list[TextPart], Field(union_mode="left_to_right")]

  @property
  def text(self) -> str:
    """The content in one string."""
    return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(_Strict):
  """Text is the only format."""

  type: Literal["text"]


class ChatCompletionRequest(_GenerationFields):
  """The body of /v1/chat/completions."""

  messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
  max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
  response_format: ResponseFormat | None = None

  @model_validator(mode="after")
  def _check_pairs(self) -> "ChatCompletionRequest":
    if self.top_logprobs is not None and not self.logprobs:
      raise ValueError("top_logprobs is for logprobs=true only")
    if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
      raise ValueError("max_tokens and max_completion_tokens differ; one of them is enough")
    return self


Request = TypeVar("Request", CompletionRequest, ChatCompletionRequest)


def parse(kind: type[Request], body: bytes) -> Request:
  """The request in a JSON body.

  Raises:
    ApiError: 400; it names the field, and says nothing of what the body held.
  """
  try:
    return kind.model_validate_json(body)
  except ValidationError as error:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
  # Where a field may be of several types, their names follow its own.
  place = [str(part)[:64] for part in first["loc"] if part not in ("str", "list[TextPart]")]
  field = ".".join(place)
  if first["type"] == "json_invalid":
    raise ApiError(400, "the body is not valid JSON", code="invalid_json")
  if first["type"] == "extra_forbidden":
    raise ApiError(400, f"{field} is not supported", param=field, code="unsupported_field")
  if not field and first["type"] == "model_type":
    raise ApiError(400, "the body must be a JSON object")
  message = first["msg"].removeprefix("Value error, ")
  message = {"missing": "is missing"}.get(first["type"], message[:1].lower() + message[1:])
  raise ApiError(400, f"{field}: {message}" if field else message, param=field or None)
