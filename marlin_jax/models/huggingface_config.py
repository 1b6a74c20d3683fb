# SPDX-License-Identifier: Apache-2.0
"""A ModelConfig from a Hugging Face config.json, read strictly, and back.

Hugging Face configs come in two spellings. Version 5 of transformers writes `rope_parameters` and `dtype`, version 4
wrote `rope_theta`, `rope_scaling` and `torch_dtype`. Both are read. Every key that the five model classes read is
either understood or refused by name: a config that is almost understood gives fluent nonsense.
"""

from collections.abc import Callable, Mapping
from typing import Any

from marlin_jax.models.config import (
  ARCHITECTURES,
  Llama3Rope,
  ModelConfig,
  MoEConfig,
  check_architecture,
  check_bool,
  check_positive_int,
  check_positive_number,
  check_token_id,
)

# Keys of these models and of near relatives that change the maths, with the only values this decoder implements.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
  "hidden_act": ("silu",),
  "partial_rotary_factor": (None, 1.0),
  "attn_logit_softcapping": (None,),
  "final_logit_softcapping": (None,),
  "query_pre_attn_scalar": (None,),
  "attention_chunk_size": (None,),
  "clip_qkv": (None,),
  "attention_multiplier": (None, 1.0),
  "embedding_multiplier": (None, 1.0),
  "residual_multiplier": (None, 1.0),
  "logits_scaling": (None, 1.0),
  "logit_scale": (None, 1.0),
  "no_rope_layers": (None, []),
  "is_encoder_decoder": (None, False),
}

# What only Qwen3MoeForCausalLM has; version 5 of transformers renamed the key.
_NUM_EXPERTS = ("num_experts", "num_local_experts")

_REQUIRED = object()


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
  """The ModelConfig of a parsed config.json, in the spelling of transformers 4 or 5.

  Raises:
    NotImplementedError: the config asks for something this decoder does not do; the message names it.
    ValueError: a key is missing or holds nonsense.
  """
  architecture = _architecture(hf)
  for key, accepted in _NEUTRAL_VALUES.items():
    if key in hf and hf[key] not in accepted:
      raise NotImplementedError(f"config: {key} {hf[key]!r} is not supported, only {accepted[-1]!r} is")
  if "AutoModelForCausalLM" in (hf.get("auto_map") or {}):
    raise NotImplementedError("config: auto_map names model code of the checkpoint's own, which is never run")
  model_type, default_head_dim = ARCHITECTURES[architecture]
  if model_type != "qwen3_moe" and any(hf.get(key) for key in _NUM_EXPERTS):
    raise NotImplementedError(f"config: experts in a {model_type} are not supported, only in a qwen3_moe")
  num_layers = _read(hf, "num_hidden_layers", check_positive_int)
  num_heads = _read(hf, "num_attention_heads", check_positive_int)
  hidden_size = _read(hf, "hidden_size", check_positive_int)
  head_dim = _read(hf, "head_dim", check_positive_int, default_head_dim or hidden_size // num_heads)
  has_attention_bias = model_type in ("llama", "qwen3", "qwen3_moe") and _read(hf, "attention_bias", check_bool, False)
  rope_theta, rope_scaling = _rope(hf)
  return ModelConfig(
    architecture=architecture,
    vocab_size=_read(hf, "vocab_size", check_positive_int),
    hidden_size=hidden_size,
    intermediate_size=_read(hf, "intermediate_size", check_positive_int),
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=_read(hf, "num_key_value_heads", check_positive_int, num_heads),
    head_dim=head_dim,
    max_position_embeddings=_read(hf, "max_position_embeddings", check_positive_int),
    rms_norm_eps=_read(hf, "rms_norm_eps", check_positive_number),
    rope_theta=rope_theta,
    rope_scaling=rope_scaling,
    sliding_windows=_sliding_windows(hf, model_type, num_layers),
    tie_word_embeddings=_read(hf, "tie_word_embeddings", check_bool, False),
    qkv_bias=model_type == "qwen2" or has_attention_bias,
    output_bias=has_attention_bias,
    mlp_bias=model_type == "llama" and _read(hf, "mlp_bias", check_bool, False),
    qk_norm=model_type in ("qwen3", "qwen3_moe"),
    moe=_moe(hf, num_layers) if model_type == "qwen3_moe" else None,
    bos_token_id=_read(hf, "bos_token_id", check_token_id, None),
    eos_token_ids=read_eos(hf),
    pad_token_id=_read(hf, "pad_token_id", check_token_id, None),
  )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
  """The config.json of this model in the spelling of transformers 5; `config_from_hf` reads it back.

  Raises:
    ValueError: the architecture cannot express the config, for example a sliding window in a Llama.
  """
  model_type, _ = ARCHITECTURES[config.architecture]
  rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
  if config.rope_scaling is not None:
    rope |= {"rope_type": "llama3"} | {name: getattr(config.rope_scaling, name) for name in Llama3Rope.__slots__}
  hf: dict[str, Any] = {
    "architectures": [config.architecture],
    "model_type": model_type,
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": config.max_position_embeddings,
    "rms_norm_eps": config.rms_norm_eps,
    "rope_parameters": rope,
    "tie_word_embeddings": config.tie_word_embeddings,
    "bos_token_id": config.bos_token_id,
    "eos_token_id": list(config.eos_token_ids) if len(config.eos_token_ids) != 1 else config.eos_token_ids[0],
    "pad_token_id": config.pad_token_id,
  }
  windows = {window for window in config.sliding_windows if window is not None}
  if model_type in ("llama", "qwen3", "qwen3_moe"):
    hf["attention_bias"] = config.output_bias
  if model_type == "llama":
    hf["mlp_bias"] = config.mlp_bias
  if model_type == "mistral":
    hf["sliding_window"] = config.sliding_windows[0]
  if model_type in ("qwen2", "qwen3"):
    hf["use_sliding_window"] = bool(windows)
    hf["sliding_window"] = max(windows, default=None)
    hf["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in config.sliding_windows]
  if model_type == "qwen3_moe":
    hf |= {"use_sliding_window": False, "sliding_window": None, "num_experts": 0}
  if config.moe is not None:
    hf |= {name: getattr(config.moe, name) for name in MoEConfig.__slots__ if name != "layers"}
    hf["mlp_only_layers"] = [layer for layer in range(config.num_layers) if layer not in config.moe.layers]
    hf["decoder_sparse_step"] = 1
  if config_from_hf(hf) != config:
    raise ValueError(f"{config.architecture} cannot express this config: {config}")
  return hf


def read_eos(hf: Mapping[str, Any]) -> tuple[int, ...]:
  """The `eos_token_id` of a config.json or generation_config.json: one id, a list of ids, or null.

  Raises:
    ValueError: it is something else.
  """
  value = hf.get("eos_token_id")
  ids = [] if value is None else value if isinstance(value, list) else [value]
  for token in ids:
    check_token_id("eos_token_id", token)
  return tuple(ids)


def _architecture(hf: Mapping[str, Any]) -> str:
  names = hf.get("architectures")
  model_type = hf.get("model_type")
  if names:
    if not isinstance(names, list) or len(names) != 1:
      raise ValueError(f"config: architectures is {names!r}, must be a list of one name")
    architecture = names[0]
  else:
    architecture = next((name for name, (kind, _) in ARCHITECTURES.items() if kind == model_type), str(model_type))
  check_architecture(architecture)
  if model_type is not None and model_type != ARCHITECTURES[architecture][0]:
    raise ValueError(f"config: model_type {model_type!r} contradicts architecture {architecture!r}")
  return architecture


def _rope(hf: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
  """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
  key = "rope_parameters" if hf.get("rope_parameters") is not None else "rope_scaling"
  rope = hf.get(key) or {}
  if not isinstance(rope, Mapping):
    raise ValueError(f"config: {key} is {rope!r}, must be an object")
  if hf.get("rope_parameters") and hf.get("rope_scaling"):
    raise ValueError("config: has both rope_parameters and rope_scaling, must have one of them")
  outer_theta = _read(hf, "rope_theta", check_positive_number, None)
  theta = _read(rope, "rope_theta", check_positive_number, outer_theta or 10000.0)
  if outer_theta not in (None, theta):
    raise ValueError(f"config: rope_theta is both {outer_theta} and {theta}, must be one number")
  rope_type = rope.get("rope_type", rope.get("type", "default"))
  fields = Llama3Rope.__slots__ if rope_type == "llama3" else ()
  if rope_type not in ("default", "llama3"):
    raise NotImplementedError(f"config: rope_type {rope_type!r} is not supported, only 'default' and 'llama3' are")
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise NotImplementedError(
      f"config: partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1.0 is"
    )
  unknown = set(rope) - {"rope_theta", "rope_type", "type", "partial_rotary_factor", *fields}
  if unknown:
    raise NotImplementedError(f"config: {key} of type {rope_type!r} has unsupported keys {sorted(unknown)}")
  if rope_type == "default":
    return theta, None
  missing = [name for name in fields if name not in rope]
  if missing:
    raise ValueError(f"config: {key} of type 'llama3' lacks {missing}")
  return theta, Llama3Rope(**{name: rope[name] for name in fields})


def _moe(hf: Mapping[str, Any], num_layers: int) -> MoEConfig | None:
  """The experts of a qwen3_moe; None if no layer has any."""
  numbers = [hf[key] for key in _NUM_EXPERTS if hf.get(key) is not None]
  if not numbers:
    raise ValueError(f"config: {_NUM_EXPERTS[0]} is missing")
  num_experts = numbers[0]
  if num_experts != numbers[-1]:
    raise ValueError(f"config: {' and '.join(_NUM_EXPERTS)} are {num_experts!r} and {numbers[-1]!r}, must be the same")
  if num_experts != 0:
    check_positive_int("num_experts", num_experts)
  step = _read(hf, "decoder_sparse_step", check_positive_int, 1)
  dense = _read(hf, "mlp_only_layers", _check_layers, [])
  layers = tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)
  if num_experts == 0 or not layers:
    return None
  return MoEConfig(
    num_experts=num_experts,
    num_experts_per_tok=_read(hf, "num_experts_per_tok", check_positive_int),
    moe_intermediate_size=_read(hf, "moe_intermediate_size", check_positive_int),
    norm_topk_prob=_read(hf, "norm_topk_prob", check_bool, False),
    layers=layers,
  )


def _sliding_windows(hf: Mapping[str, Any], model_type: str, num_layers: int) -> tuple[int | None, ...]:
  # 4096 is what the model classes take when the key is absent; null switches the window off.
  window = hf.get("sliding_window", None if model_type == "llama" else 4096)
  if window is not None:
    check_positive_int("sliding_window", window)
  if model_type == "qwen3_moe":
    # Releases of transformers differ in which layers of this class have the window.
    if _read(hf, "use_sliding_window", check_bool, False):
      raise NotImplementedError("config: use_sliding_window in a qwen3_moe is not supported")
    window = None
  if model_type == "llama" and window is not None:
    raise NotImplementedError(f"config: sliding_window {window} in a llama is not supported")
  if model_type in ("qwen2", "qwen3"):
    if not _read(hf, "use_sliding_window", check_bool, False):
      window = None
    first = hf.get("max_window_layers", 28)
    if not isinstance(first, int):
      raise ValueError(f"config: max_window_layers is {first!r}, must be an integer")
    windows = tuple(window if layer >= first else None for layer in range(num_layers))
  else:
    windows = (window,) * num_layers
  types = hf.get("layer_types")
  return windows if types is None else _windows_of_layer_types(types, model_type, window, windows)


def _windows_of_layer_types(
  types: Any, model_type: str, window: int | None, windows: tuple[int | None, ...]
) -> tuple[int | None, ...]:
  if not isinstance(types, list) or len(types) != len(windows):
    raise ValueError(f"config: layer_types is {types!r}, must be a list of {len(windows)} entries, one a layer")
  unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
  if unknown:
    raise NotImplementedError(
      f"config: layer type {unknown[0]!r} is not supported, only 'full_attention' and 'sliding_attention' are"
    )
  if "sliding_attention" in types and window is None:
    raise ValueError("config: layer_types has 'sliding_attention', but there is no sliding_window in use")
  by_type = tuple(window if kind == "sliding_attention" else None for kind in types)
  if model_type in ("llama", "mistral", "qwen3_moe") and by_type != windows:
    # These classes do not read layer_types, so a list that says something else is not to be trusted.
    raise NotImplementedError(f"config: layer_types of a {model_type} that contradict its sliding_window {window}")
  return by_type


def _read(hf: Mapping[str, Any], key: str, check: Callable[[str, Any], None], default: Any = _REQUIRED) -> Any:
  """hf[key], checked; the default where it is absent or null."""
  value = hf.get(key)
  if value is None:
    if default is _REQUIRED:
      raise ValueError(f"config: {key} is missing")
    return default
  check(key, value)
  return value


def _check_layers(name: str, value: Any) -> None:
  if not isinstance(value, list) or any(type(layer) is not int for layer in value):
    raise ValueError(f"{name} is {value!r}, must be a list of layers by number")
