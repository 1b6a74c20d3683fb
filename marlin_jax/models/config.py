# SPDX-License-Identifier: Apache-2.0
"""What a decoder of the Llama family is, in numbers."""

from dataclasses import dataclass
from typing import Any

# The model_type and the config class's own default for head_dim (None: hidden_size / heads) of each architecture.
ARCHITECTURES = {
  "LlamaForCausalLM": ("llama", None),
  "MistralForCausalLM": ("mistral", None),
  "Qwen2ForCausalLM": ("qwen2", None),
  "Qwen3ForCausalLM": ("qwen3", 128),
  "Qwen3MoeForCausalLM": ("qwen3_moe", None),
}

_POSITIVE_INTS = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_layers",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Rope:
  """The frequency scaling of Llama 3.1: long wavelengths stretched by `factor`, short ones kept, a ramp between."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int

  def __post_init__(self):
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
      check_positive_number(f"llama3 rope {name}", getattr(self, name))
    check_positive_int("llama3 rope original_max_position_embeddings", self.original_max_position_embeddings)
    if self.high_freq_factor <= self.low_freq_factor:
      raise ValueError(
        f"llama3 rope high_freq_factor is {self.high_freq_factor}, must be above low_freq_factor {self.low_freq_factor}"
      )


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
  """A mixture of experts, and which layers have it in the place of their MLP.

  Attributes:
    num_experts: of such a layer.
    num_experts_per_tok: those that a token goes through.
    moe_intermediate_size: of each of them.
    norm_topk_prob: the router's weights of a token's experts are scaled to add up to one.
    layers: the indices of the layers, ascending.
  """

  num_experts: int
  num_experts_per_tok: int
  moe_intermediate_size: int
  norm_topk_prob: bool
  layers: tuple[int, ...]

  def __post_init__(self):
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
      check_positive_int(name, getattr(self, name))
    check_bool("norm_topk_prob", self.norm_topk_prob)
    if self.num_experts_per_tok > self.num_experts:
      raise ValueError(
        f"num_experts_per_tok is {self.num_experts_per_tok}, must be at most num_experts {self.num_experts}"
      )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
  """The shape and the options of one decoder-only model.

  `sliding_windows` has one entry a layer: how many keys a query sees, itself included, or None for all of them. Left
  out, every layer sees all keys. `intermediate_size` is of the layers that have no experts.
  """

  architecture: str = "LlamaForCausalLM"
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_position_embeddings: int
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  rope_scaling: Llama3Rope | None = None
  sliding_windows: tuple[int | None, ...] = ()
  tie_word_embeddings: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  moe: MoEConfig | None = None
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  pad_token_id: int | None = None

  def __post_init__(self):
    check_architecture(self.architecture)
    for name in _POSITIVE_INTS:
      check_positive_int(name, getattr(self, name))
    if not self.sliding_windows:
      object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)
    check_positive_number("rms_norm_eps", self.rms_norm_eps)
    check_positive_number("rope_theta", self.rope_theta)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
    if self.head_dim % 2:
      raise ValueError(f"head_dim is {self.head_dim}, must be even: RoPE turns pairs")
    if len(self.sliding_windows) != self.num_layers:
      raise ValueError(
        f"sliding_windows has {len(self.sliding_windows)} entries, must have {self.num_layers}, one a layer"
      )
    if self.moe and not set(self.moe.layers) <= set(range(self.num_layers)):
      raise ValueError(f"layers with experts are {self.moe.layers}, must lie in 0 .. {self.num_layers - 1}")


def check_architecture(architecture: Any) -> None:
  """NotImplementedError unless the decoder does this architecture."""
  if architecture not in ARCHITECTURES:
    raise NotImplementedError(f"architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)} are")


def check_token_id(name: str, value: Any) -> None:
  """ValueError unless `value`, named `name`, is a token id."""
  if not isinstance(value, int) or isinstance(value, bool) or value < 0:
    raise ValueError(f"{name} is {value!r}, must be a token id")


def check_positive_int(name: str, value: Any) -> None:
  """ValueError unless `value`, named `name`, is a positive integer."""
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f"{name} is {value!r}, must be a positive integer")


def check_positive_number(name: str, value: Any) -> None:
  """ValueError unless `value`, named `name`, is a positive, finite number."""
  if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
    raise ValueError(f"{name} is {value!r}, must be a positive number")


def check_bool(name: str, value: Any) -> None:
  """ValueError unless `value`, named `name`, is true or false."""
  if not isinstance(value, bool):
    raise ValueError(f"{name} is {value!r}, must be true or false")
