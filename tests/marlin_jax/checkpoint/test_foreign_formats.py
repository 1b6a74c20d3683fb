# SPDX-License-Identifier: Apache-2.0
"""Variants of checkpoints that other tools wrote: the same weights, or one sentence that says why not."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from marlin_jax.checkpoint import CheckpointError, compressed_tensors, gptq, load_model, marlin
from marlin_jax.checkpoint.huggingface import tensor_name
from marlin_jax.nnx import QuantLinear
from marlin_jax.packing import unpack

DATA = Path(__file__).parents[2] / "data"
GPTQ, CT, MARLIN = (DATA / name for name in ("gptq-int4-g128-sym", "ct-int4-g128-sym", "marlin-orig-g128"))
FOREIGN = pytest.mark.parametrize("folder", [GPTQ, CT, MARLIN], ids=lambda folder: folder.name)
LAYER = "model.layers.0.self_attn.k_proj"


def quantized_layers(model) -> dict[str, QuantLinear]:
  return {tensor_name(p): layer for p, layer in nnx.iter_modules(model) if isinstance(layer, QuantLinear)}


def weights(model) -> dict[str, np.ndarray]:
  """Layer -> dequantized weight [N, K]."""
  return {name: np.asarray(unpack(layer.packed).dequantize()).T for name, layer in quantized_layers(model).items()}


@FOREIGN
def test_scales_keep_the_stored_dtype(folder):
  dtype = jnp.bfloat16 if folder == CT else jnp.float16
  assert {layer.scales[...].dtype for layer in quantized_layers(load_model(folder)).values()} == {jnp.dtype(dtype)}


# The layouts, written the way the specification counts them: word by word, not as a transpose.


def words_along(axis: int, fields: np.ndarray, bits: int = 4) -> np.ndarray:
  per_word = 32 // bits
  fields = np.moveaxis(fields.astype(np.uint32), axis, 0).reshape(-1, per_word, fields.shape[1 - axis])
  words = sum(fields[:, j] << np.uint32(bits * j) for j in range(per_word))
  return np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32)


def marlin_words(codes: np.ndarray) -> np.ndarray:
  order = []
  for lane in range(32):
    for tile in range(4):
      entries = [
        16 * row + lane // 4 + 8 * block + 256 * tile
        for block in (0, 1)
        for row in (2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4 + 4), 2 * (lane % 4 + 4) + 1)
      ]
      order += [entries[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
  k, n = codes.shape
  blocks = codes.reshape(k // 16, 16, n // 16, 16).transpose(0, 2, 1, 3).reshape(k // 16, -1, 1024)
  return words_along(1, blocks[..., order].reshape(k // 16, 16 * n))


def marlin_scales(scales: np.ndarray) -> np.ndarray:
  if scales.shape[0] > 1:
    order = [i + 8 * j for i in range(8) for j in range(8)]
  else:
    order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
  return scales.reshape(-1, len(order))[:, order].reshape(scales.shape)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_decoders_undo_the_specified_layouts(rng, groups):
  codes = rng.integers(0, 16, (256, 512)).astype(np.uint8)
  scales = rng.standard_normal((groups, 512)).astype(np.float16)
  for decoded in (
    (gptq.decode(jnp.asarray(words_along(0, codes))), scales),
    (compressed_tensors.decode(jnp.asarray(words_along(1, codes.T))), scales),
    marlin.decode(jnp.asarray(marlin_words(codes)), jnp.asarray(marlin_scales(scales))),
  ):
    np.testing.assert_array_equal(decoded[0], codes, strict=True)
    np.testing.assert_array_equal(decoded[1], scales, strict=True)


# Variants: what a change to a folder's tensors or settings makes of it.


def tensors_of(folder: Path, change):
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")


def of_every(leaf, function):
  """A change that replaces every tensor of this last name."""

  def change(tensors):
    for name in tensors:
      if name.endswith(f".{leaf}"):
        tensors[name] = function(tensors[name])

  return lambda folder: tensors_of(folder, change)


def of_one(leaf, function):
  """A change that replaces one layer's tensor; None removes it."""

  def change(tensors):
    tensors[f"{LAYER}.{leaf}"] = function(tensors.get(f"{LAYER}.{leaf}"))
    if tensors[f"{LAYER}.{leaf}"] is None:
      del tensors[f"{LAYER}.{leaf}"]

  return lambda folder: tensors_of(folder, change)


def with_value(value):
  def function(tensor):
    tensor = tensor.copy()
    tensor.flat[3] = value
    return tensor

  return function


def settings(*path, **changes):
  """A change of quantization_config, or of the object in it at `path`."""

  def apply(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    target = config["quantization_config"]
    for key in path:
      target = target[key]
    target |= changes
    (folder / "config.json").write_text(json.dumps(config))

  return apply


def truncate(folder: Path):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:500_000])


def both(*changes):
  def apply(folder: Path):
    for change in changes:
      change(folder)

  return apply


def ct(**changes):
  return settings("config_groups", "group_0", "weights", **changes)


def version_2(qzeros):
  return (qzeros.view(np.uint32) + np.uint32(0x11111111)).view(np.int32)


def halve_groups(scales):
  """The same scales for groups of half the size, GPTQ orientation."""
  return scales.repeat(2, axis=0)


def drop(folder: Path, leaf):
  tensors_of(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(f".{leaf}")])


SAME = {
  "gptq version 2": (GPTQ, both(settings(checkpoint_format="gptq_v2"), of_every("qzeros", version_2))),
  "gptq version 2 that says version 1": (GPTQ, of_every("qzeros", version_2)),
  "gptq of unnamed version": (GPTQ, settings(checkpoint_format=None, format=None)),
  "gptq without g_idx": (GPTQ, lambda folder: drop(folder, "g_idx")),
  "gptq that says act-order and has none": (GPTQ, settings(desc_act=True)),
  "gptq with biases of zero": (GPTQ, of_one("bias", lambda _: np.zeros(128, np.float16))),
  "gptq with groups of 64": (
    GPTQ,
    both(
      settings(group_size=64),
      of_every("qzeros", halve_groups),
      of_every("scales", halve_groups),
      of_every("g_idx", lambda g_idx: (np.arange(g_idx.size) // 64).astype(np.int32)),
    ),
  ),
  "gptq with layers of their own group size": (
    GPTQ,
    both(
      settings(dynamic={"-:lm_head": {}, rf"+:{re.escape(LAYER)}": {"group_size": 64}}),
      of_one("qzeros", halve_groups),
      of_one("scales", halve_groups),
      of_one("g_idx", lambda g_idx: (np.arange(g_idx.size) // 64).astype(np.int32)),
    ),
  ),
  "compressed-tensors with groups of 32": (
    CT,
    both(ct(group_size=32), of_every("weight_scale", lambda scale: scale.repeat(4, axis=1))),
  ),
  "compressed-tensors with the format of older files": (CT, settings("config_groups", "group_0", format=None)),
  "compressed-tensors with a group for one layer": (
    CT,
    both(
      settings(
        "config_groups",
        group_1={
          "targets": [f"re:.*{LAYER[-6:]}"],
          "weights": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64},
        },
      ),
      of_every("k_proj.weight_scale", lambda scale: scale.repeat(2, axis=1)),
    ),
  ),
}


@pytest.mark.parametrize(("source", "change"), SAME.values(), ids=SAME.keys())
def test_other_ways_to_say_the_same_weights(tmp_path, source, change):
  shutil.copytree(source, tmp_path, dirs_exist_ok=True)
  change(tmp_path)
  expected = weights(load_model(source))
  for name, w in weights(load_model(tmp_path)).items():
    np.testing.assert_array_equal(w, expected[name], err_msg=name)


def test_files_of_other_names(tmp_path):
  # AutoGPTQ's own: the settings in a file beside config.json, and in the name of the weights.
  shutil.copytree(GPTQ, tmp_path, dirs_exist_ok=True)
  config = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-128g.safetensors")
  expected = weights(load_model(GPTQ))
  for name, w in weights(load_model(tmp_path)).items():
    np.testing.assert_array_equal(w, expected[name], err_msg=name)
  (tmp_path / "another.safetensors").touch()
  with pytest.raises(CheckpointError, match=r"has \['another.safetensors', 'gptq_model-4bit-128g.safetensors'\]"):
    load_model(tmp_path)


@pytest.mark.parametrize(
  ("source", "changes"),
  [
    (GPTQ, [settings(group_size=-1), *(of_every(leaf, lambda t: t[:1]) for leaf in ("scales", "qzeros"))]),
    (CT, [ct(strategy="channel", group_size=None), of_every("weight_scale", lambda scale: scale[:, :1])]),
    (MARLIN, [settings(group_size=-1), of_every("s", lambda s: s[:1])]),
  ],
  ids=["gptq", "compressed-tensors", "marlin"],
)
def test_one_scale_a_column(tmp_path, source, changes):
  shutil.copytree(source, tmp_path, dirs_exist_ok=True)
  both(*changes)(tmp_path)
  if source == GPTQ:
    of_every("g_idx", np.zeros_like)(tmp_path)
  layers, grouped = (quantized_layers(load_model(folder)) for folder in (tmp_path, source))
  for name, layer in layers.items():
    assert layer.packed.group_size == layer.in_features
    np.testing.assert_array_equal(layer.qweight[...], grouped[name].qweight[...])
    # MARLIN orders the scales of whole columns in its own way; the test of the decoders has it.
    ours, theirs = layer.scales[...], grouped[name].scales[:1]
    np.testing.assert_array_equal(*(np.sort(s) if source == MARLIN else s for s in (ours, theirs)))


BROKEN = {
  "gptq truncated": (GPTQ, truncate, r"model\.safetensors is not a whole safetensors file"),
  "gptq words of another dtype": (
    GPTQ,
    of_one("qweight", lambda t: t.astype(np.int64)),
    "k_proj.qweight is int64, must be int32",
  ),
  "gptq zeros of another dtype": (
    GPTQ,
    of_one("qzeros", lambda t: t.astype(np.float32)),
    "k_proj.qzeros is float32, must be int32",
  ),
  "gptq scales of another dtype": (
    GPTQ,
    of_one("scales", lambda t: t.astype(np.float64)),
    "k_proj.scales is float64, must be bfloat16, float16 or float32",
  ),
  "gptq words missing": (
    GPTQ,
    of_one("qweight", lambda _: None),
    r"tensor model.layers.0.self_attn.k_proj.qweight of shape \(32, 128\) is missing",
  ),
  "gptq zeros missing": (GPTQ, of_one("qzeros", lambda _: None), r"k_proj.qzeros of shape \(2, 16\) is missing"),
  "gptq scales missing": (GPTQ, of_one("scales", lambda _: None), r"k_proj.scales of shape \(2, 128\) is missing"),
  "gptq act-order without g_idx": (
    GPTQ,
    both(settings(desc_act=True), of_one("g_idx", lambda _: None)),
    r"k_proj.g_idx of shape \(256,\) is missing",
  ),
  "gptq g_idx too large": (
    GPTQ,
    of_one("g_idx", with_value(2)),
    "k_proj.g_idx has values from 0 to 2, must be groups from 0 to 1",
  ),
  "gptq g_idx negative": (GPTQ, of_one("g_idx", with_value(-1)), "k_proj.g_idx has values from -1 to 1, must be"),
  "gptq g_idx of another length": (
    GPTQ,
    of_one("g_idx", lambda t: t[:-1]),
    r"k_proj.g_idx has shape \(255,\), must have \(256,\)",
  ),
  "gptq scale of zero": (GPTQ, of_one("scales", with_value(0)), "k_proj.scales has zeros, scales must not be zero"),
  "gptq scale of NaN": (GPTQ, of_one("scales", with_value(np.nan)), "k_proj.scales has NaN or infinite values"),
  "gptq of another group size": (
    GPTQ,
    settings(group_size=64),
    r"qzeros has shape \(4, 32\), must have \(8, 32\)|qzeros has shape \(2, \d+\), must have \(4, \d+\)",
  ),
  "gptq without bits": (GPTQ, settings(bits=None), "has None bits, group size 128 and symmetry True, must be"),
  "gptq with a group size that is text": (
    GPTQ,
    settings(group_size="128"),
    "group size '128' and symmetry True, must be",
  ),
  "gptq with a bad pattern": (GPTQ, settings(dynamic={"+:(": {}}), "quantization_config: dynamic: "),
  "gptq with a bias": (
    GPTQ,
    of_one("bias", lambda _: np.ones(128, np.float16)),
    r"k_proj.bias of shape \(128,\) is unexpected",
  ),
  "compressed-tensors truncated": (CT, truncate, r"model\.safetensors is not a whole safetensors file"),
  "compressed-tensors words of another dtype": (
    CT,
    of_one("weight_packed", lambda t: t.astype(np.int64)),
    "k_proj.weight_packed is int64, must be int32",
  ),
  "compressed-tensors words missing": (
    CT,
    of_one("weight_packed", lambda _: None),
    r"k_proj.weight_packed of shape \(128, 32\) is missing",
  ),
  "compressed-tensors scales missing": (
    CT,
    of_one("weight_scale", lambda _: None),
    r"k_proj.weight_scale of shape \(128, 2\) is missing",
  ),
  "compressed-tensors shape missing": (
    CT,
    of_one("weight_shape", lambda _: None),
    r"k_proj.weight_shape of shape \(2,\) is missing",
  ),
  "compressed-tensors of another shape": (
    CT,
    of_one("weight_shape", lambda t: t[::-1]),
    r"k_proj.weight_shape holds \(256, 128\), must hold \(128, 256\)",
  ),
  "compressed-tensors shape of another dtype": (
    CT,
    of_one("weight_shape", lambda t: t.astype(np.float32)),
    "k_proj.weight_shape is float32, must be int32 or int64",
  ),
  "compressed-tensors scale of zero": (CT, of_one("weight_scale", with_value(0)), "k_proj.weight_scale has zeros"),
  "compressed-tensors scale of NaN": (CT, of_one("weight_scale", with_value(np.nan)), "k_proj.weight_scale has NaN"),
  "compressed-tensors of another group size": (
    CT,
    ct(group_size=64),
    r"weight_scale has shape \(\d+, [24]\), must have \(\d+, [48]\)",
  ),
  "compressed-tensors with zero points": (
    CT,
    of_one("weight_zero_point", lambda _: np.zeros((16, 2), np.int32)),
    r"k_proj.weight_zero_point of shape \(16, 2\) is unexpected",
  ),
  "compressed-tensors without groups": (CT, settings(config_groups=None), "config_groups must be an object of objects"),
  "compressed-tensors without weights": (
    CT,
    settings("config_groups", "group_0", weights=None),
    "weights is None, must be an object",
  ),
  "compressed-tensors without a group size": (
    CT,
    ct(group_size=None),
    "group_size is missing for the strategy 'group'",
  ),
  "compressed-tensors of unnamed layers": (
    CT,
    settings("config_groups", "group_0", targets=["re:model.layers.1"]),
    "no targets name the quantized layer model.layers.0.",
  ),
  "compressed-tensors with a bad pattern": (
    CT,
    settings("config_groups", "group_0", targets=["re:("]),
    "quantization_config: targets: ",
  ),
  "marlin truncated": (MARLIN, truncate, r"model\.safetensors is not a whole safetensors file"),
  "marlin words of another dtype": (
    MARLIN,
    of_one("B", lambda t: t.astype(np.int64)),
    "k_proj.B is int64, must be int32",
  ),
  "marlin words missing": (MARLIN, of_one("B", lambda _: None), r"k_proj.B of shape \(16, 512\) is missing"),
  "marlin scales missing": (MARLIN, of_one("s", lambda _: None), r"k_proj.s of shape \(2, 256\) is missing"),
  "marlin scale of zero": (MARLIN, of_one("s", with_value(0)), "k_proj.s has zeros, scales must not be zero"),
  "marlin scale of infinity": (MARLIN, of_one("s", with_value(np.inf)), "k_proj.s has NaN or infinite values"),
  "marlin tensors in what says it is gptq": (
    MARLIN,
    settings(is_marlin_format=False),
    r"tensor model\.layers\.\S+\.weight of shape \(256, 256\) is missing",
  ),
  "marlin of another group size": (MARLIN, settings(group_size=-1), r"s has shape \(2, 256\), must have \(1, 256\)"),
}


@pytest.mark.parametrize(("source", "damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_checkpoints(tmp_path, source, damage, message):
  shutil.copytree(source, tmp_path, dirs_exist_ok=True)
  damage(tmp_path)
  with pytest.raises(CheckpointError, match=message):
    load_model(tmp_path)


REFUSED = {
  "gptq with 3 bits": (GPTQ, settings(bits=3), r"layer model\.layers\.\S+ has 3 bits"),
  "gptq with 2 bits in one layer": (GPTQ, settings(dynamic={LAYER: {"bits": 2}}), f"layer {LAYER} has 2 bits"),
  "gptq with small groups": (GPTQ, settings(group_size=8), r"layer model\.layers\.\S+ has groups of 8"),
  "gptq with groups of different sizes": (
    GPTQ,
    of_one("g_idx", with_value(1)),
    f"tensor {LAYER}.g_idx has groups that are not all of 128 features",
  ),
  "gptq in an unknown order": (GPTQ, settings(checkpoint_format="qqq"), "GPTQ checkpoint_format is 'qqq', not one of"),
  "gptq in other words": (GPTQ, settings(pack_dtype="int16"), "GPTQ pack_dtype is 'int16', not 'int32'"),
  "compressed-tensors with 2 bits": (CT, ct(num_bits=2), r"layer model\.layers\.\S+ has 2 bits"),
  "compressed-tensors in an unknown order": (CT, ct(actorder="twice"), r"has the actorder 'twice'"),
  "compressed-tensors with floating-point codes": (CT, ct(type="float"), "has codes of type 'float'"),
  "compressed-tensors with one scale a layer": (CT, ct(strategy="tensor"), "has the strategy 'tensor'"),
  "compressed-tensors with 8-bit activations": (
    CT,
    settings("config_groups", "group_0", input_activations={"num_bits": 8}),
    r"layer model\.layers\.\S+ has quantized input activations",
  ),
  "compressed-tensors of another format": (
    CT,
    settings("config_groups", "group_0", format="marlin-24"),
    "compressed-tensors format is 'marlin-24', not 'pack-quantized'",
  ),
  "compressed-tensors with 2:4 sparsity": (
    CT,
    settings(sparsity_config={"format": "sparse-24-bitmask"}),
    "sparsity_config has the format 'sparse-24-bitmask'",
  ),
  "compressed-tensors with a quantized cache": (CT, settings(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is {"),
  "marlin with small groups": (MARLIN, settings(group_size=64), "has groups of 128 or whole columns, not of 64"),
  "an unknown method": (GPTQ, settings(quant_method="bnb"), "quant_method 'bnb' is not supported, only 'marlin_jax',"),
  "awq in another packing": (GPTQ, settings(quant_method="awq", version="GEMV"), "AWQ version is 'gemv', not 'gemm'"),
  "awq with 8 bits": (GPTQ, settings(quant_method="awq", bits=8), "AWQ of 8 bits has no agreed order of words"),
}


@pytest.mark.parametrize(("source", "change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_codes_cannot_hold_is_refused_by_name(tmp_path, source, change, message):
  shutil.copytree(source, tmp_path, dirs_exist_ok=True)
  change(tmp_path)
  with pytest.raises(NotImplementedError, match=message):
    load_model(tmp_path)
