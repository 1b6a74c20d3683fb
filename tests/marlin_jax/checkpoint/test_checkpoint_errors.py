# SPDX-License-Identifier: Apache-2.0
"""Every way a checkpoint folder can be broken gives one sentence that names the file or the tensor."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from marlin_jax.checkpoint import CheckpointError, load_model, quantize_tensors, save_model
from marlin_jax.quantized import QuantSpec

DATA = Path(__file__).parents[2] / "data"
SINGLE, SHARDED = DATA / "llama3rope-tied-bf16", DATA / "mistral-sharded-bf16"
NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
LAST_SHARD = "model-00005-of-00005.safetensors"


def change_tensors(change, file="model.safetensors"):
  def apply(folder: Path):
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / file)

  return apply


def change_json(file, **changes):
  def apply(folder: Path):
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(content))

  return apply


def change_weight_map(change):
  def apply(folder: Path):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))

  return apply


def write(file, content):
  return lambda folder: (folder / file).write_bytes(content)


def truncate(file, size):
  return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def remove(file):
  return lambda folder: (folder / file).unlink()


def replace_value(name, value, dtype=None):
  def change(tensors):
    tensors[name] = tensors[name].astype(dtype or tensors[name].dtype)
    tensors[name].flat[3] = value

  return change_tensors(change)


def escape_by_link(folder: Path):
  shutil.move(folder / LAST_SHARD, folder.parent / "elsewhere.safetensors")
  (folder / LAST_SHARD).symlink_to(folder.parent / "elsewhere.safetensors")


def both(*changes):
  def apply(folder: Path):
    for change in changes:
      change(folder)

  return apply


def quantization(**changes):
  settings = {"quant_method": "marlin_jax", "format_version": 1, "bits": 4, "group_size": 64}
  settings |= {"symmetric": True, "act_order": False}
  return change_json("config.json", quantization_config=settings | changes)


BROKEN_FLOAT = {
  "no config": (SINGLE, remove("config.json"), r"config\.json is missing"),
  "config is no JSON": (SINGLE, write("config.json", b"{"), r"config\.json is not valid JSON"),
  "config is not UTF-8": (SINGLE, write("config.json", b'{"a": "\xff"}'), r"config\.json is not valid JSON"),
  "config is a list": (SINGLE, write("config.json", b"[1]"), r"config\.json holds a JSON list, must hold an object"),
  "config with nonsense": (
    SINGLE,
    change_json("config.json", hidden_size=-1),
    r"config\.json: hidden_size is -1, must be a positive integer",
  ),
  "generation config with nonsense": (
    SINGLE,
    change_json("generation_config.json", eos_token_id="</s>"),
    "eos_token_id is '</s>', must be a token id",
  ),
  "no weights": (SINGLE, remove("model.safetensors"), "neither model.safetensors nor model.safetensors.index.json"),
  "both kinds of weights": (
    SHARDED,
    write("model.safetensors", b""),
    "both model.safetensors and model.safetensors.in",
  ),
  "truncated file": (SINGLE, truncate("model.safetensors", 700_000), r"model\.safetensors is not a whole safetensors"),
  "truncated header": (SINGLE, truncate("model.safetensors", 100), r"model\.safetensors is not a whole safetensors"),
  "empty file": (SINGLE, truncate("model.safetensors", 0), r"model\.safetensors is not a whole safetensors file"),
  "missing shard": (SHARDED, remove(LAST_SHARD), r"model-00005-of-00005\.safetensors is missing"),
  "truncated shard": (SHARDED, truncate(LAST_SHARD, 1000), r"model-00005-of-00005\.safetensors is not a whole"),
  "index is no JSON": (SHARDED, write("model.safetensors.index.json", b"no"), r"index\.json is not valid JSON"),
  "index without a map": (
    SHARDED,
    write("model.safetensors.index.json", b"{}"),
    r"index\.json: weight_map must be an object",
  ),
  "index leads up": (
    SHARDED,
    change_weight_map(lambda weight_map: weight_map.update({NORM: "../x.safetensors"})),
    r"shard '\.\./x\.safetensors' lies outside the folder",
  ),
  "index is absolute": (
    SHARDED,
    change_weight_map(lambda weight_map: weight_map.update({NORM: "/etc/hostname"})),
    "shard '/etc/hostname' lies outside the folder",
  ),
  "index leads out by a link": (SHARDED, escape_by_link, f"shard '{LAST_SHARD}' lies outside the folder"),
  "tensor in two shards": (
    SHARDED,
    change_tensors(lambda tensors: tensors.update({NORM: np.ones(128, np.float32)}), LAST_SHARD),
    "tensor model.norm.weight is in two shards, model-00004-of-00005.safetensors and model-00005-of-00005.safetensors",
  ),
  "tensor that the index does not know": (
    SHARDED,
    change_tensors(lambda tensors: tensors.update({"extra": np.ones(1, np.float32)}), LAST_SHARD),
    r"model-00005-of-00005\.safetensors holds tensor extra, which model\.safetensors\.index\.json does not place",
  ),
  "index entry without tensor": (
    SHARDED,
    change_weight_map(lambda weight_map: weight_map.update({"extra": LAST_SHARD})),
    r"model-00005-of-00005\.safetensors lacks tensor extra",
  ),
  "missing tensor": (
    SINGLE,
    change_tensors(lambda tensors: tensors.pop(UP)),
    re.escape(f"tensor {UP} of shape (256, 128) is missing"),
  ),
  "unexpected tensor": (
    SINGLE,
    change_tensors(lambda tensors: tensors.update({"model.layers.2.x": np.ones(3, np.float32)})),
    re.escape("tensor model.layers.2.x of shape (3,) is unexpected"),
  ),
  "wrong shape": (
    SINGLE,
    change_tensors(lambda tensors: tensors.update({UP: tensors[UP].T})),
    re.escape(f"tensor {UP} has shape (128, 256), must have (256, 128)"),
  ),
  "wrong dtype": (
    SINGLE,
    change_tensors(lambda tensors: tensors.update({NORM: np.ones(128, np.int32)})),
    f"tensor {NORM} is int32, must be bfloat16, float16 or float32",
  ),
  "double precision": (
    SINGLE,
    change_tensors(lambda tensors: tensors.update({NORM: np.ones(128)})),
    f"tensor {NORM} is float64, must be",
  ),
  "NaN": (SINGLE, replace_value(UP, np.nan), f"tensor {UP} has NaN or infinite values as bfloat16, must be finite"),
  "infinity": (SINGLE, replace_value(NORM, np.inf), f"tensor {NORM} has NaN or infinite values as bfloat16"),
}

BROKEN_QUANTIZED = {
  "words of another dtype": (
    change_tensors(lambda tensors: tensors.update({"q": tensors["q"].astype(np.int32)})),
    "tensor model.layers.0.mlp.up_proj.qweight is int32, must be int16",
  ),
  "words of another shape": (
    change_tensors(lambda tensors: tensors.update({"q": tensors["q"][:1]})),
    re.escape("up_proj.qweight has shape (1, 2, 32, 32), must have (4, 2, 32, 32)"),
  ),
  "scales of another group size": (
    quantization(group_size=32),
    re.escape("k_proj.scales has shape (2, 64), must have (4, 64)"),
  ),
  "scales missing": (
    change_tensors(lambda tensors: tensors.pop("s")),
    re.escape("tensor model.layers.0.mlp.up_proj.scales of shape (2, 256) is missing"),
  ),
  "scales with NaN": (replace_value("s", np.nan), "up_proj.scales has NaN or infinite values"),
  "an unknown quantized layer": (
    change_tensors(lambda tensors: tensors.update({"model.x.qweight": tensors["q"]})),
    "model.x is quantized, but LlamaForCausalLM has no such dense layer",
  ),
  "group size that is none": (quantization(group_size=40), "quantization_config: group_size=40 must be a pos"),
  "zero points missing": (
    quantization(symmetric=False),
    re.escape("k_proj.zeros of shape (2, 64) is missing"),
  ),
  "permutation missing": (quantization(act_order=True), re.escape("k_proj.permutation of shape (128,) is missing")),
  "a permutation that is none": (
    both(
      quantization(layers={"model.layers.0.mlp.up_proj": {"act_order": True}}),
      change_tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.permutation": np.zeros(128, np.int32)})),
    ),
    "up_proj.permutation must hold every number from 0 to 127 once",
  ),
  "8 bits in words of 4": (
    quantization(bits=8),
    re.escape("qweight has shape (1, 2, 32, 32), must have (1, 2, 64, 32)"),
  ),
  "scale of zero": (replace_value("s", 0), "up_proj.scales has zeros, scales must not be zero"),
  "group size that is text": (quantization(group_size="64"), "quantization_config: "),
  "unknown setting": (quantization(zero_points=True), "quantization_config: .*zero_points"),
  "exceptions that are none": (quantization(layers=[1]), "quantization_config: "),
  "quantization_config is no object": (
    change_json("config.json", quantization_config=[]),
    r"quantization_config is \[\], must be an object",
  ),
}


@pytest.mark.parametrize(("source", "damage", "message"), BROKEN_FLOAT.values(), ids=BROKEN_FLOAT.keys())
def test_broken_float_checkpoints(tmp_path, source, damage, message):
  folder = tmp_path / "model"
  shutil.copytree(source, folder)
  damage(folder)
  with pytest.raises(CheckpointError, match=message):
    load_model(folder)
  with pytest.raises(CheckpointError, match=message):
    quantize_tensors(folder, tmp_path / "out", QuantSpec(group_size=64), progress=False)
  assert [path.name for path in tmp_path.iterdir() if path.name not in ("model", "elsewhere.safetensors")] == []


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
  folder = tmp_path_factory.mktemp("quantized") / "model"
  quantize_tensors(SINGLE, folder, QuantSpec(group_size=64), progress=False)
  return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sparse") / "model"
  quantize_tensors(SINGLE, folder, QuantSpec(group_size=64, sparse24=True), progress=False)
  return folder


@pytest.mark.parametrize(("damage", "message"), BROKEN_QUANTIZED.values(), ids=BROKEN_QUANTIZED.keys())
def test_broken_quantized_checkpoints(tmp_path, quantized, damage, message):
  shutil.copytree(quantized, tmp_path, dirs_exist_ok=True)
  # "q" and "s" in the table stand for the two tensors of one layer.
  short = {"model.layers.0.mlp.up_proj.qweight": "q", "model.layers.0.mlp.up_proj.scales": "s"}
  rename(tmp_path, short)
  damage(tmp_path)
  rename(tmp_path, {value: key for key, value in short.items()})
  with pytest.raises(CheckpointError, match=message):
    load_model(tmp_path)


META = "model.layers.0.mlp.up_proj.meta"


def positions(nibble: int):
  """Change the positions of one quad."""

  def change(tensors):
    tensors[META].view(np.uint16).flat[7] = tensors[META].view(np.uint16).flat[7] & 0xF0FF | nibble << 8

  return change_tensors(change)


BROKEN_SPARSE = {
  "equal positions": (positions(0b0101), "up_proj.meta must hold two ascending positions for every four weights"),
  "positions out of order": (positions(0b0001), "up_proj.meta must hold two ascending positions"),
  "no positions": (
    change_tensors(lambda tensors: tensors.pop(META)),
    re.escape("up_proj.meta of shape (4, 2, 32, 16) is missing"),
  ),
  "positions of another shape": (
    change_tensors(lambda tensors: tensors.update({META: tensors[META][:1]})),
    re.escape("up_proj.meta has shape (1, 2, 32, 16), must have (4, 2, 32, 16)"),
  ),
  "positions of another dtype": (
    change_tensors(lambda tensors: tensors.update({META: tensors[META].astype(np.int32)})),
    "up_proj.meta is int32, must be int16",
  ),
  "dense settings": (quantization(), re.escape("down_proj.qweight has shape (2, 2, 32, 32), must have (2, 4, 32, 32)")),
  "sparsity that is text": (quantization(sparse24="yes"), "quantization_config: "),
  "truncated": (truncate("model.safetensors", 200_000), r"model\.safetensors is not a whole safetensors file"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN_SPARSE.values(), ids=BROKEN_SPARSE.keys())
def test_broken_sparse_checkpoints(tmp_path, sparse, damage, message):
  shutil.copytree(sparse, tmp_path, dirs_exist_ok=True)
  load_model(tmp_path)
  damage(tmp_path)
  with pytest.raises(CheckpointError, match=message):
    load_model(tmp_path)


def test_a_sparse_checkpoint_of_what_sparse_weights_do_not_have_is_refused(tmp_path, sparse):
  shutil.copytree(sparse, tmp_path, dirs_exist_ok=True)
  for change, message in (
    (dict(act_order=True), "is 2:4 sparse and has act-order, which is not supported"),
    (dict(bits=8), "sparse24 with bits=8 and symmetric=True is not implemented"),
  ):
    quantization(sparse24=True, **change)(tmp_path)
    with pytest.raises(NotImplementedError, match=message):
      load_model(tmp_path)


def rename(folder: Path, names: dict[str, str]):
  tensors = load_file(folder / "model.safetensors")
  save_file({names.get(name, name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_values_that_overflow_the_dtype_are_refused(tmp_path):
  shutil.copytree(SINGLE, tmp_path, dirs_exist_ok=True)
  replace_value(UP, 1e6, np.float32)(tmp_path)
  load_model(tmp_path)
  with pytest.raises(CheckpointError, match=f"tensor {UP} has NaN or infinite values as float16"):
    load_model(tmp_path, dtype=np.float16)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
  shutil.copytree(SINGLE, tmp_path, dirs_exist_ok=True)
  change_json("config.json", architectures=["MixtralForCausalLM"], model_type="mixtral")(tmp_path)
  with pytest.raises(NotImplementedError, match="architecture 'MixtralForCausalLM' is not supported"):
    load_model(tmp_path)


def test_a_path_that_is_nothing(tmp_path):
  with pytest.raises(CheckpointError, match="nothing does not exist, must be a checkpoint folder or the name of a Hub"):
    load_model(tmp_path / "nothing")
  (tmp_path / "file").touch()
  with pytest.raises(CheckpointError, match="file is a file, must be a checkpoint folder"):
    load_model(tmp_path / "file")


def test_an_output_folder_that_is_taken(tmp_path):
  (tmp_path / "note").touch()
  model = load_model(SINGLE)
  for write_into in (
    lambda path: save_model(model, path),
    lambda path: quantize_tensors(SINGLE, path, QuantSpec(group_size=64), progress=False),
  ):
    with pytest.raises(CheckpointError, match="exists and is not empty"):
      write_into(tmp_path)
    with pytest.raises(CheckpointError, match="note is a file, must be a folder that does not exist yet"):
      write_into(tmp_path / "note")
  assert [path.name for path in tmp_path.iterdir()] == ["note"]
