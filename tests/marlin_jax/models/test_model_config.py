# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from marlin_jax.models import Llama3Rope, ModelConfig, MoEConfig, config_from_hf, config_to_hf
from tests.marlin_jax.small_moe import SMALL_MOE

DATA = Path(__file__).parents[2] / "data"
CHECKPOINTS = ["llama-bf16", "llama3rope-tied-bf16", "mistral-sharded-bf16", "qwen2-bf16", "qwen3-bf16"]

LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_act": "silu",
  "hidden_size": 128,
  "intermediate_size": 256,
  "max_position_embeddings": 64,
  "num_attention_heads": 4,
  "num_hidden_layers": 3,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "vocab_size": 512,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MOE = LLAMA | {
  "architectures": ["Qwen3MoeForCausalLM"],
  "model_type": "qwen3_moe",
  "num_experts": 8,
  "num_experts_per_tok": 2,
  "moe_intermediate_size": 32,
}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_round_trip_through_the_hugging_face_form(name):
  config = config_from_hf(json.loads((DATA / name / "config.json").read_text()))
  assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
  assert hash(config) == hash(config_from_hf(config_to_hf(config)))


def test_both_spellings_of_rope_mean_the_same():
  version_4 = LLAMA | {
    "rope_theta": 5e5,
    "rope_scaling": LLAMA3_ROPE | {"rope_type": "llama3"},
    "torch_dtype": "bfloat16",
  }
  version_5 = LLAMA | {"rope_parameters": LLAMA3_ROPE | {"rope_type": "llama3", "rope_theta": 5e5}, "dtype": "bfloat16"}
  assert config_from_hf(version_4) == config_from_hf(version_5)
  assert config_from_hf(version_4).rope_scaling == Llama3Rope(**LLAMA3_ROPE)
  assert config_from_hf(LLAMA | {"rope_theta": 7.0, "rope_scaling": None}).rope_theta == 7.0
  assert config_from_hf(LLAMA | {"rope_scaling": {"type": "default"}}).rope_scaling is None


@pytest.mark.parametrize(
  ("hf", "expected"),
  [
    (LLAMA, {"head_dim": 32, "num_kv_heads": 2, "qkv_bias": False, "rope_theta": 10000.0, "eos_token_ids": ()}),
    (LLAMA | {"num_key_value_heads": None}, {"num_kv_heads": 4}),
    (LLAMA | {"head_dim": 64}, {"head_dim": 64}),
    (LLAMA | {"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True, "output_bias": True, "mlp_bias": True}),
    (LLAMA | {"eos_token_id": [2, 7]}, {"eos_token_ids": (2, 7)}),
    (LLAMA | {"eos_token_id": 2}, {"eos_token_ids": (2,)}),
    (MISTRAL, {"sliding_windows": (4096, 4096, 4096)}),
    (MISTRAL | {"sliding_window": None}, {"sliding_windows": (None, None, None)}),
    (MISTRAL | {"sliding_window": 8}, {"sliding_windows": (8, 8, 8)}),
    (QWEN2, {"qkv_bias": True, "output_bias": False, "sliding_windows": (None, None, None)}),
    (QWEN2 | {"sliding_window": 8, "max_window_layers": 1}, {"sliding_windows": (None, None, None)}),
    (
      QWEN2 | {"sliding_window": 8, "max_window_layers": 1, "use_sliding_window": True},
      {"sliding_windows": (None, 8, 8)},
    ),
    (
      QWEN3
      | {
        "sliding_window": 8,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
      },
      {"sliding_windows": (8, None, 8), "head_dim": 128, "qk_norm": True, "qkv_bias": False},
    ),
    (QWEN3 | {"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
    # As Qwen3-30B-A3B has them: a window that is not used.
    (
      MOE | {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1},
      {"sliding_windows": (None, None, None), "head_dim": 32, "qk_norm": True, "qkv_bias": False},
    ),
    (LLAMA | {"transformers_version": "4.1", "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True}, {}),
  ],
)
def test_what_each_architecture_reads(hf, expected):
  config = config_from_hf(hf)
  assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "'MixtralForCausalLM' is not supported"),
    ({"num_local_experts": 8}, "experts in a llama are not supported, only in a qwen3_moe"),
    ({"architectures": None, "model_type": "gemma"}, "'gemma' is not supported"),
    ({"architectures": None, "model_type": None}, "architecture 'None' is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic' is not supported"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_type 'linear' is not supported"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not"),
    ({"rope_parameters": {"rope_theta": 1e4, "mscale": 2}}, r"unsupported keys \['mscale'\]"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, r"unsupported keys \['full_attention'\]"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map names model code"),
    ({"sliding_window": 8}, "sliding_window 8 in a llama is not supported"),
    (
      {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
      "layer type 'chunked_attention' is not supported",
    ),
  ],
)
def test_what_is_not_covered_is_refused_by_name(change, message):
  with pytest.raises(NotImplementedError, match=message):
    config_from_hf(LLAMA | change)


@pytest.mark.parametrize(
  ("change", "layers"),
  [
    ({}, (0, 1, 2)),
    ({"decoder_sparse_step": 2}, (1,)),
    ({"decoder_sparse_step": 3, "mlp_only_layers": None}, (2,)),
    ({"mlp_only_layers": [0, 7]}, (1, 2)),
    ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, None),
    ({"num_experts": 0}, None),
    ({"num_experts": None, "num_local_experts": 8}, (0, 1, 2)),
    ({"num_local_experts": 8}, (0, 1, 2)),
  ],
)
def test_which_layers_have_experts(change, layers):
  config = config_from_hf(MOE | change)
  assert (config.moe and config.moe.layers) == layers
  assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_experts_in_numbers():
  expected = MoEConfig(
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=False, layers=(0, 1, 2)
  )
  assert config_from_hf(MOE).moe == expected
  assert config_from_hf(MOE | {"norm_topk_prob": True}).moe.norm_topk_prob
  assert config_from_hf(config_to_hf(SMALL_MOE)) == SMALL_MOE


def test_a_window_that_releases_disagree_on_is_refused():
  with pytest.raises(NotImplementedError, match="use_sliding_window in a qwen3_moe is not supported"):
    config_from_hf(MOE | {"use_sliding_window": True, "sliding_window": 8})


def test_layer_types_of_a_class_that_does_not_read_them_must_agree():
  types = {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
  with pytest.raises(NotImplementedError, match="layer_types of a mistral that contradict its sliding_window 8"):
    config_from_hf(MISTRAL | types)
  types["layer_types"] = ["sliding_attention"] * 3
  assert config_from_hf(MISTRAL | types).sliding_windows == (8, 8, 8)


@pytest.mark.parametrize(
  ("hf", "message"),
  [
    ({key: value for key, value in LLAMA.items() if key != "vocab_size"}, "vocab_size is missing"),
    (LLAMA | {"hidden_size": "128"}, "hidden_size is '128', must be a positive integer"),
    (LLAMA | {"num_attention_heads": 0}, "num_attention_heads is 0, must be a positive integer"),
    (LLAMA | {"num_hidden_layers": True}, "num_hidden_layers is True, must be a positive integer"),
    (LLAMA | {"num_key_value_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
    (LLAMA | {"num_key_value_heads": 0}, "num_key_value_heads is 0, must be a positive integer"),
    (LLAMA | {"head_dim": 33}, "head_dim is 33, must be even"),
    (LLAMA | {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, must be a positive number"),
    (LLAMA | {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', must be true or false"),
    (LLAMA | {"eos_token_id": "</s>"}, "eos_token_id is '</s>', must be a token id"),
    (LLAMA | {"model_type": "mistral"}, "model_type 'mistral' contradicts architecture 'LlamaForCausalLM'"),
    (LLAMA | {"architectures": ["A", "B"]}, "architectures is .* must be a list of one name"),
    (LLAMA | {"rope_scaling": "llama3"}, "rope_scaling is 'llama3', must be an object"),
    (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"lacks \['low_freq_factor'"),
    (LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is both 10000.0 and 500000.0"),
    (
      LLAMA | {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "default"}},
      "both rope_parameters and rope_scaling",
    ),
    (
      LLAMA | {"rope_scaling": LLAMA3_ROPE | {"rope_type": "llama3", "high_freq_factor": 1.0}},
      "high_freq_factor is 1.0, must be above low_freq_factor 1.0",
    ),
    ({key: value for key, value in MOE.items() if key != "num_experts"}, "num_experts is missing"),
    (MOE | {"num_experts": "8"}, "num_experts is '8', must be a positive integer"),
    (MOE | {"num_local_experts": 4}, "num_experts and num_local_experts are 8 and 4, must be the same"),
    (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, must be at most num_experts 8"),
    (MOE | {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
    (MOE | {"norm_topk_prob": 1}, "norm_topk_prob is 1, must be true or false"),
    (MOE | {"mlp_only_layers": "0"}, "mlp_only_layers is '0', must be a list of layers by number"),
    (MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, must be a positive integer"),
    (MISTRAL | {"sliding_window": -1}, "sliding_window is -1, must be a positive integer"),
    (QWEN2 | {"layer_types": ["full_attention"]}, r"layer_types is \['full_attention'\], must be a list of 3"),
    (QWEN2 | {"layer_types": ["sliding_attention"] * 3}, "there is no sliding_window in use"),
  ],
)
def test_nonsense_is_a_value_error(hf, message):
  with pytest.raises(ValueError, match=message):
    config_from_hf(hf)


def test_a_config_that_its_architecture_cannot_express_is_not_written():
  config = config_from_hf(LLAMA)
  with_window = ModelConfig(
    **{name: getattr(config, name) for name in config.__slots__} | {"sliding_windows": (8,) * 3}
  )
  with pytest.raises(ValueError, match="LlamaForCausalLM cannot express this config"):
    config_to_hf(with_window)
