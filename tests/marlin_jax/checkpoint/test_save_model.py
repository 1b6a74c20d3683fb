# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from marlin_jax.checkpoint import (
  CheckpointError,
  load_model,
  open_checkpoint,
  quantize_tensors,
  safetensors_files,
  save_model,
)
from marlin_jax.checkpoint.layers import on_device
from marlin_jax.models import fuse, unfuse
from marlin_jax.nnx import QuantLinear
from marlin_jax.packing import unpack
from marlin_jax.quantization import quantize
from marlin_jax.quantized import QuantSpec, SparsePackedTensor
from marlin_jax.text import generate

DATA = Path(__file__).parents[2] / "data"
CHECKPOINTS = ["llama-bf16", "llama3rope-tied-bf16", "mistral-sharded-bf16", "qwen2-bf16", "qwen3-bf16"]
TIED = DATA / "llama3rope-tied-bf16"

forward = nnx.jit(lambda model, tokens: model(tokens))
TOKENS = jnp.arange(12).reshape(2, 6)


def assert_same_tensors(a, b):
  a, b = open_checkpoint(a), open_checkpoint(b)
  assert set(a) == set(b)
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


def assert_same_state(a, b):
  a, b = (dict(nnx.to_flat_state(nnx.state(model))) for model in (a, b))
  assert a.keys() == b.keys()
  for path, variable in a.items():
    np.testing.assert_array_equal(variable[...], b[path][...], err_msg=str(path), strict=True)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_load_quantize_save_load_gives_the_same_model(name, tmp_path):
  model = quantize(load_model(DATA / name), group_size=64, progress=False)
  save_model(model, tmp_path / "saved")
  again = load_model(tmp_path / "saved")
  assert isinstance(again.layers[1].mlp.down_proj, QuantLinear)
  assert again.config == model.config and again.tokenizer == model.tokenizer
  assert_same_state(model, again)
  np.testing.assert_array_equal(forward(model, TOKENS), forward(again, TOKENS))
  # Greedy and without a cache: the token of the largest logit after the prompt. The loop must begin with it too.
  (row,) = generate(again, [TOKENS[0].tolist()], max_new_tokens=3)
  assert row[0] == int(forward(model, TOKENS)[0, -1].argmax()) and 1 <= len(row) <= 3


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_streaming_writes_what_the_model_in_memory_would(name, tmp_path):
  save_model(quantize(load_model(DATA / name), group_size=32, progress=False), tmp_path / "memory")
  quantize_tensors(DATA / name, tmp_path / "streamed", QuantSpec(group_size=32), progress=False)
  assert_same_tensors(tmp_path / "memory", tmp_path / "streamed")
  assert load_model(tmp_path / "memory").config == load_model(tmp_path / "streamed").config


def test_a_float_model_comes_back_as_it_was(tmp_path):
  save_model(load_model(DATA / "qwen2-bf16"), tmp_path / "saved")
  assert_same_tensors(DATA / "qwen2-bf16", tmp_path / "saved")
  assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_format_and_files(tmp_path):
  quantize_tensors(DATA / "llama-bf16", tmp_path / "out", QuantSpec(group_size=None), progress=False)
  tensors = load_file(tmp_path / "out" / "model.safetensors")
  qweight, scales = (tensors[f"model.layers.0.mlp.down_proj.{part}"] for part in ("qweight", "scales"))
  assert qweight.dtype == np.int16 and qweight.shape == (256 // 64, 512 // 64, 32, 32)
  assert scales.dtype == jnp.bfloat16 and scales.shape == (1, 256)
  assert "model.layers.0.mlp.down_proj.weight" not in tensors and "lm_head.weight" in tensors
  source, config = (json.loads((f / "config.json").read_text()) for f in (DATA / "llama-bf16", tmp_path / "out"))
  expected = {"quant_method": "marlin_jax", "format_version": 1, "bits": 4, "group_size": None}
  expected |= {"symmetric": True, "sparse24": False, "act_order": False}
  assert config == source | {"quantization_config": expected}
  for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
    assert (tmp_path / "out" / file).read_bytes() == (DATA / "llama-bf16" / file).read_bytes()
  assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_layers_of_different_group_sizes_are_told_apart(tmp_path):
  model = load_model(DATA / "llama-bf16")
  quantize(model, group_size=128, predicate=lambda path, layer: path[-1] == "q_proj", progress=False)
  quantize(model, group_size=None, predicate=lambda path, layer: path[-1] == "o_proj", progress=False)
  quantize(model, group_size=32, predicate=lambda path, layer: "mlp" in path, progress=False)
  save_model(model, tmp_path / "saved")
  settings = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
  assert settings["group_size"] == 32
  assert settings["layers"] == {
    f"model.layers.{i}.self_attn.{name}": {"group_size": size}
    for i in range(2)
    for name, size in (("q_proj", 128), ("o_proj", None))
  }
  again = load_model(tmp_path / "saved")
  assert isinstance(again.layers[0].attention.k_proj, nnx.Linear)
  assert_same_state(model, again)


def test_bits_zeros_and_act_order_of_single_layers_come_back(tmp_path):
  model = load_model(DATA / "llama-bf16")
  quantize(model, bits=8, predicate=lambda path, layer: path[-1] == "q_proj", progress=False)
  quantize(model, symmetric=False, predicate=lambda path, layer: path[-1] == "v_proj", progress=False)
  quantize(model, predicate=lambda path, layer: path[-1] in ("o_proj", "up_proj", "down_proj"), progress=False)
  mlp = model.layers[1].mlp
  order = jnp.asarray(np.random.default_rng(0).permutation(256), jnp.int32)
  mlp.up_proj = QuantLinear.from_packed(dataclasses.replace(mlp.up_proj.packed, permutation=order), dtype=jnp.bfloat16)
  save_model(model, tmp_path / "saved")
  settings = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
  assert settings["layers"] == {
    "model.layers.1.mlp.up_proj": {"act_order": True},
    **{f"model.layers.{i}.self_attn.q_proj": {"bits": 8} for i in range(2)},
    **{f"model.layers.{i}.self_attn.v_proj": {"symmetric": False} for i in range(2)},
  }
  again = load_model(tmp_path / "saved")
  assert isinstance(again.layers[0].attention.k_proj, nnx.Linear)
  assert_same_state(model, again)
  np.testing.assert_array_equal(forward(model, TOKENS), forward(again, TOKENS))


@pytest.mark.parametrize("name", ["llama-bf16", "llama3rope-tied-bf16"])
def test_a_sparse_model_comes_back_from_memory_and_from_the_stream(name, tmp_path):
  model = quantize(load_model(DATA / name), group_size=64, sparse24=True, progress=False)
  save_model(fuse(model), tmp_path / "memory")
  quantize_tensors(DATA / name, tmp_path / "streamed", QuantSpec(group_size=64, sparse24=True), progress=False)
  assert_same_tensors(tmp_path / "memory", tmp_path / "streamed")
  settings = json.loads((tmp_path / "memory" / "config.json").read_text())["quantization_config"]
  assert settings["sparse24"] is True and "layers" not in settings
  again = load_model(tmp_path / "memory")
  assert isinstance(again.layers[1].mlp.down_proj.packed, SparsePackedTensor)
  np.testing.assert_array_equal(forward(unfuse(model), TOKENS), forward(again, TOKENS))


def test_sparsity_of_single_layers_comes_back(tmp_path):
  model = load_model(DATA / "llama-bf16")
  quantize(model, sparse24=True, predicate=lambda path, layer: path[-1] == "q_proj", progress=False)
  quantize(model, bits=8, predicate=lambda path, layer: path[-1] == "v_proj", progress=False)
  quantize(model, predicate=lambda path, layer: "mlp" in path, progress=False)
  save_model(model, tmp_path / "saved")
  settings = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
  assert settings["layers"] == {
    **{f"model.layers.{i}.self_attn.q_proj": {"sparse24": True} for i in range(2)},
    **{f"model.layers.{i}.self_attn.v_proj": {"bits": 8} for i in range(2)},
  }
  assert_same_state(model, load_model(tmp_path / "saved"))


def test_a_column_that_is_one_group_of_the_common_size_is_no_exception(tmp_path):
  # K is 128 everywhere but in down_proj, so most layers have one group of 128.
  quantize_tensors(TIED, tmp_path / "streamed", progress=False)
  save_model(load_model(tmp_path / "streamed"), tmp_path / "saved")
  settings = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
  expected = {"quant_method": "marlin_jax", "format_version": 1, "bits": 4, "group_size": 128}
  assert settings == expected | {"symmetric": True, "sparse24": False, "act_order": False}
  assert_same_tensors(tmp_path / "streamed", tmp_path / "saved")


def test_shards_with_an_index(tmp_path):
  quantize_tensors(TIED, tmp_path / "one", QuantSpec(group_size=64), progress=False)
  quantize_tensors(TIED, tmp_path / "many", QuantSpec(group_size=64), max_shard_bytes=40_000, progress=False)
  assert_same_tensors(tmp_path / "one", tmp_path / "many")
  index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
  shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
  assert sorted(set(index["weight_map"].values())) == shards
  assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors" and len(shards) > 3
  total = 0
  for shard in shards:
    sizes = [tensor.nbytes for tensor in load_file(tmp_path / "many" / shard).values()]
    assert sum(sizes) <= 40_000 or len(sizes) == 1
    total += sum(sizes)
  assert index["metadata"] == {"total_size": total}


def test_only_chosen_layers_are_quantized(tmp_path):
  quantize_tensors(
    TIED, tmp_path / "out", QuantSpec(group_size=64), predicate=lambda path, layer: "mlp" in path, progress=False
  )
  names = {name.rsplit(".", 2)[1] for name in open_checkpoint(tmp_path / "out") if name.endswith(".qweight")}
  assert names == {"gate_proj", "up_proj", "down_proj"}


def test_other_tensors_keep_their_dtype(tmp_path):
  shutil.copytree(TIED, tmp_path / "source")
  tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(TIED / "model.safetensors").items()}
  save_file(tensors, tmp_path / "source" / "model.safetensors")
  quantize_tensors(tmp_path / "source", tmp_path / "out", QuantSpec(group_size=64), progress=False)
  out = open_checkpoint(tmp_path / "out")
  assert {out[name].dtype for name in out} == {np.dtype(np.float32), np.dtype(np.int16)}


def test_a_group_size_that_does_not_divide_k_writes_nothing(tmp_path):
  source = tmp_path / "source"
  shutil.copytree(TIED, source)
  # intermediate_size 256 -> 224: down_proj then has K = 224, which 128 does not divide.
  tensors = load_file(source / "model.safetensors")
  for name in tensors:
    if "gate_proj" in name or "up_proj" in name:
      tensors[name] = np.ascontiguousarray(tensors[name][:224])
    if "down_proj" in name:
      tensors[name] = np.ascontiguousarray(tensors[name][:, :224])
  save_file(tensors, source / "model.safetensors")
  config = json.loads((source / "config.json").read_text())
  (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 224}))
  with pytest.raises(ValueError, match=r"layer model\.layers\.0\.mlp\.down_proj: group_size=128 does not divide k=224"):
    quantize_tensors(source, tmp_path / "out", progress=False)
  assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_quantized_source_is_refused(tmp_path):
  quantize_tensors(TIED, tmp_path / "out", QuantSpec(group_size=64), progress=False)
  with pytest.raises(CheckpointError, match="is quantized already, must be a float checkpoint"):
    quantize_tensors(tmp_path / "out", tmp_path / "again", progress=False)


@pytest.mark.parametrize("full_after", [0, 2])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, full_after):
  written = []
  save_file = safetensors_files.save_file

  def fill_up(tensors, file, **options):
    if len(written) == full_after:
      Path(file).write_bytes(b"half")
      raise OSError(28, os.strerror(28))
    written.append(file)
    save_file(tensors, file, **options)

  monkeypatch.setattr(safetensors_files, "save_file", fill_up)
  options = {"max_shard_bytes": 40_000}
  with pytest.raises(CheckpointError, match=r"out could not be written: .*No space left on device"):
    quantize_tensors(TIED, tmp_path / "out", QuantSpec(group_size=64), progress=False, **options)
  written.clear()
  with pytest.raises(CheckpointError, match=r"out could not be written: .*No space left on device"):
    save_model(load_model(TIED), tmp_path / "out", **options)
  assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
  def interrupt(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(safetensors_files, "save_file", interrupt)
  with pytest.raises(KeyboardInterrupt):
    save_model(load_model(TIED), tmp_path / "out")
  assert list(tmp_path.iterdir()) == []


def test_an_existing_empty_folder_is_filled(tmp_path):
  (tmp_path / "out").mkdir()
  save_model(load_model(TIED), tmp_path / "out")
  assert_same_tensors(TIED, tmp_path / "out")


def test_a_progress_bar_is_shown(tmp_path, capsys):
  quantize_tensors(TIED, tmp_path / "out", QuantSpec(group_size=64))
  assert "quantize: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
  "spec",
  [QuantSpec(group_size=64), QuantSpec(group_size=32, symmetric=False), QuantSpec(bits=8, group_size=None)],
  ids=str,
)
def test_compressed_tensors_holds_the_same_weights(tmp_path, spec):
  quantize_tensors(TIED, tmp_path / "ours", spec, progress=False)
  quantize_tensors(TIED, tmp_path / "theirs", spec, format="compressed-tensors", progress=False)
  assert_same_state(load_model(tmp_path / "ours"), load_model(tmp_path / "theirs"))
  tensors = open_checkpoint(tmp_path / "theirs")
  layer = "model.layers.0.mlp.down_proj"
  assert tensors[f"{layer}.weight_packed"].dtype == np.int32
  assert tensors[f"{layer}.weight_packed"].shape == (128, 256 * spec.bits // 32)
  assert tensors[f"{layer}.weight_scale"].shape == (128, spec.groups(256))
  assert (f"{layer}.weight_zero_point" in tensors) == (not spec.symmetric)
  settings = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
  (group,) = settings["config_groups"].values()
  assert settings["format"] == group["format"] == "pack-quantized" and group["targets"] == ["Linear"]
  assert group["weights"]["strategy"] == ("group" if spec.group_size else "channel")


def test_compressed_tensors_holds_a_sparse_weight_with_its_zeros(tmp_path):
  spec = QuantSpec(group_size=64, sparse24=True)
  quantize_tensors(TIED, tmp_path / "ours", spec, progress=False)
  quantize_tensors(TIED, tmp_path / "theirs", spec, format="compressed-tensors", progress=False)
  ours, theirs = (load_model(tmp_path / name) for name in ("ours", "theirs"))
  for a, b in zip(ours.layers, theirs.layers, strict=True):
    for w, dense in ((a.mlp.up_proj.packed, b.mlp.up_proj.packed), (a.mlp.down_proj.packed, b.mlp.down_proj.packed)):
      np.testing.assert_array_equal(unpack(w).dequantize(), unpack(dense).dequantize())
      assert dense.meta is None


def test_the_head_is_ignored_by_name(tmp_path):
  quantize_tensors(DATA / "llama-bf16", tmp_path / "out", format="compressed-tensors", progress=False)
  assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
  for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    assert (tmp_path / "out" / file).read_bytes() == (DATA / "llama-bf16" / file).read_bytes()


def test_an_array_does_not_change_with_its_file(tmp_path):
  # On a CPU an array may be the memory that it was made of, if that begins at a multiple of 64: here the file's.
  path = tmp_path / "tensor"
  path.write_bytes(b"\1" * 4096)
  tensor = np.frombuffer(np.memmap(path, np.uint8, "r"), np.int32)
  array = on_device(tensor, None)
  with path.open("r+b") as file:
    file.write(b"\2" * 4096)
  assert (tensor == 0x02020202).all() and (array == 0x01010101).all()
