# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from marlin_jax.checkpoint import CheckpointError, load_model, open_checkpoint
from marlin_jax.tokenizer import Tokenizer

DATA = Path(__file__).parents[2] / "data"
LLAMA, TIED, MISTRAL, QWEN2 = (
  DATA / name for name in ("llama-bf16", "llama3rope-tied-bf16", "mistral-sharded-bf16", "qwen2-bf16")
)


def test_weights_are_the_stored_ones_transposed():
  model, stored = load_model(QWEN2), load_file(QWEN2 / "model.safetensors")
  layer = model.layers[1].attention
  np.testing.assert_array_equal(layer.q_proj.kernel[...], stored["model.layers.1.self_attn.q_proj.weight"].T)
  np.testing.assert_array_equal(layer.q_proj.bias[...], stored["model.layers.1.self_attn.q_proj.bias"])
  np.testing.assert_array_equal(model.embed.embedding[...], stored["model.embed_tokens.weight"])
  np.testing.assert_array_equal(model.norm.scale[...], stored["model.norm.weight"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_that_of_weights_and_computation(dtype):
  model = load_model(TIED, dtype=dtype)
  assert {variable[...].dtype for _, variable in nnx.to_flat_state(nnx.state(model))} == {jnp.dtype(dtype)}
  assert model.dtype == model.layers[0].mlp.up_proj.dtype == dtype
  assert jax.eval_shape(model, jnp.zeros((1, 2), jnp.int32)).dtype == jnp.float32


def test_weights_go_to_the_given_device():
  device = jax.devices("cpu")[-1]
  for _, variable in nnx.to_flat_state(nnx.state(load_model(TIED, device=device))):
    assert variable[...].devices() == {device}


def test_the_model_knows_its_tokenizer():
  model = load_model(LLAMA)
  assert model.tokenizer == Tokenizer.from_folder(LLAMA)
  assert hash(nnx.graphdef(model)) == hash(nnx.graphdef(load_model(LLAMA)))
  assert load_model(TIED).tokenizer is None


def test_end_tokens_of_generation_config_win(tmp_path):
  shutil.copytree(TIED, tmp_path, dirs_exist_ok=True)
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
  assert load_model(tmp_path).config.eos_token_ids == (2, 5)
  (tmp_path / "generation_config.json").unlink()
  assert load_model(tmp_path).config.eos_token_ids == (2,)


def test_open_checkpoint_reads_one_tensor_at_a_time_by_name():
  checkpoint = open_checkpoint(MISTRAL)
  assert len(checkpoint) == 21 and "lm_head.weight" in checkpoint
  assert checkpoint.shape("model.layers.0.mlp.up_proj.weight") == (256, 128)
  tensor = checkpoint["lm_head.weight"]
  assert tensor.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(
    tensor, load_file(MISTRAL / "model-00005-of-00005.safetensors")["lm_head.weight"], strict=True
  )
  with pytest.raises(CheckpointError, match="tensor nope is missing"):
    checkpoint["nope"]


def test_a_tied_checkpoint_may_repeat_its_embedding_as_head(tmp_path):
  shutil.copytree(TIED, tmp_path, dirs_exist_ok=True)
  tensors = load_file(TIED / "model.safetensors")
  save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
  assert not hasattr(load_model(tmp_path), "lm_head")
  save_file(tensors | {"lm_head.weight": -tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
  with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
    load_model(tmp_path)


def test_the_rotary_buffers_of_old_llama_files_are_passed_over(tmp_path):
  shutil.copytree(TIED, tmp_path, dirs_exist_ok=True)
  old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}
  save_file(load_file(TIED / "model.safetensors") | old, tmp_path / "model.safetensors")
  load_model(tmp_path)


def cached(tmp_path, monkeypatch, source: Path) -> Path:
  """`source` as the Hub's cache holds it: a snapshot of links into blobs."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  repository, commit = tmp_path / "models--org--model", "0" * 40
  snapshot = repository / "snapshots" / commit
  for folder in (snapshot, repository / "blobs", repository / "refs"):
    folder.mkdir(parents=True)
  (repository / "refs" / "main").write_text(commit)
  for i, file in enumerate(sorted(source.iterdir())):
    shutil.copyfile(file, repository / "blobs" / str(i))
    (snapshot / file.name).symlink_to(f"../../blobs/{i}")
  return snapshot


def test_a_hub_model_in_the_cache_is_found_by_name(tmp_path, monkeypatch):
  snapshot = cached(tmp_path, monkeypatch, MISTRAL)
  assert open_checkpoint("org/model").folder == snapshot
  assert load_model("org/model").config == load_model(MISTRAL).config
  with pytest.raises(CheckpointError, match="org/other is neither a folder nor a Hub model in the local cache"):
    load_model("org/other")


def test_random_weights_are_never_made(monkeypatch):
  # nnx.eval_shape traces the constructor; a concrete array from an initializer would show here.
  concrete = []
  make = jax.random.normal

  def spy(*args, **kwargs):
    made = make(*args, **kwargs)
    concrete.extend([made] if not isinstance(made, jax.core.Tracer) else [])
    return made

  monkeypatch.setattr(jax.random, "normal", spy)
  load_model(TIED)
  assert concrete == []


def test_a_quantized_checkpoint_of_another_kind_is_refused_by_name(tmp_path):
  shutil.copytree(TIED, tmp_path, dirs_exist_ok=True)
  config = json.loads((TIED / "config.json").read_text())
  for quantization, message in [
    ({"quant_method": "aqlm"}, "quant_method 'aqlm' is not supported, only 'marlin_jax'"),
    ({}, "quant_method None is not supported"),
    ({"quant_method": "marlin_jax", "format_version": 2}, "format_version 2 is not supported, only 1 is"),
    ({"quant_method": "marlin_jax", "format_version": 1, "bits": 3}, "bits=3 is not implemented"),
  ]:
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(NotImplementedError, match=message):
      load_model(tmp_path)
