# SPDX-License-Identifier: Apache-2.0
"""Every format that is read, written here from its specification, with random codes: exact, or one clear error."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from marlin_jax.checkpoint import CheckpointError, compressed_tensors, load_model
from marlin_jax.checkpoint.quantized_layers import quantized_layers
from marlin_jax.checkpoint.safetensors_files import Checkpoint
from marlin_jax.packing import unpack
from marlin_jax.quantized import QuantizedTensor, QuantSpec
from tests.marlin_jax.checkpoint.test_foreign_formats import quantized_layers as layers_of
from tests.marlin_jax.checkpoint.test_foreign_formats import words_along

BASE = Path(__file__).parents[2] / "data" / "gptq-int4-g128-sym"
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which column of eight field i holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
  """What a quantizer found out about one layer."""

  codes: np.ndarray  # [K, N]
  scales: np.ndarray  # [G, N]
  zeros: np.ndarray  # [G, N]
  g_idx: np.ndarray  # [K]
  bits: int

  def dequantized(self) -> np.ndarray:
    zeros, scales = (part.astype(np.float32)[self.g_idx] for part in (self.zeros, self.scales))
    return scales * (self.codes.astype(np.float32) - zeros)


def random_weight(rng, k, n, group_size, *, bits=4, symmetric=False, act_order=False, fractional=False, smallest=0):
  groups = k // (group_size or k)
  shape = (groups, n)
  if symmetric:
    zeros = np.full(shape, 2 ** (bits - 1))
  else:
    zeros = rng.uniform(0, 2**bits - 1, shape) if fractional else rng.integers(smallest, 2**bits, shape)
  g_idx = np.arange(k) // (group_size or k)
  return Weight(
    codes=rng.integers(0, 2**bits, (k, n)).astype(np.uint8),
    scales=(rng.uniform(0.01, 0.02, shape) * rng.choice([-1, 1], shape)).astype(np.float16),
    zeros=zeros.astype(np.float16),
    g_idx=(rng.permutation(g_idx) if act_order else g_idx).astype(np.int32),
    bits=bits,
  )


def gptq_tensors(w: Weight, writer: str) -> dict[str, np.ndarray]:
  zeros = w.zeros.astype(np.int64)
  if writer == "version 2":
    qzeros = words_along(1, zeros, w.bits)
  elif writer == "gptqmodel":  # one from each field of the word at once: 0 borrows from its neighbour
    ones = sum(1 << (w.bits * j) for j in range(32 // w.bits))
    qzeros = (words_along(1, zeros, w.bits).view(np.uint32) - np.uint32(ones)).view(np.int32)
  else:
    qzeros = words_along(1, (zeros - 1) % 2**w.bits, w.bits)
  return {"qweight": words_along(0, w.codes, w.bits), "qzeros": qzeros, "scales": w.scales, "g_idx": w.g_idx}


def awq_tensors(w: Weight) -> dict[str, np.ndarray]:
  def words(fields):
    return words_along(1, fields.reshape(fields.shape[0], -1, 8)[:, :, AWQ_ORDER].reshape(fields.shape))

  return {"qweight": words(w.codes), "qzeros": words(w.zeros.astype(np.int64)), "scales": w.scales}


def ct_tensors(w: Weight, *, symmetric=False, grouped=False, unpacked_zeros=False) -> dict[str, np.ndarray]:
  tensors = {
    "weight_packed": words_along(1, w.codes.T, w.bits),
    "weight_scale": w.scales.T,
    "weight_shape": np.array(w.codes.T.shape, np.int64),
  }
  if not symmetric:
    zeros = w.zeros.T.astype(np.int64)
    signed = (zeros - 2 ** (w.bits - 1)).astype(np.int8)
    tensors["weight_zero_point"] = signed if unpacked_zeros else words_along(0, zeros, w.bits)
  if grouped:
    tensors["weight_g_idx"] = w.g_idx
  return tensors


def hqq_tensors(w: Weight) -> dict[str, np.ndarray]:
  k, n = w.codes.shape
  rows = w.codes.T.reshape(n * w.scales.shape[0], -1)
  half = len(rows) // 2
  words = rows if w.bits == 8 else rows[:half] << 4 | rows[half:]
  flags = ("view_as_float", "quant_scale", "quant_zero", "round_zero", "optimize", "offload_meta", "channel_wise")
  return {
    "W_q": words,
    "scale": w.scales.T.reshape(-1, 1),
    "zero": w.zeros.T.reshape(-1, 1),
    "nbits": np.array(w.bits, np.int32),
    "group_size": np.array(k // w.scales.shape[0], np.int32),
    "axis": np.array(1, np.int32),
    "shape": np.array([n, k], np.int64),
    "packing": np.frombuffer(f"{w.bits}bit_u8".encode(), np.uint8),
    "compute_dtype": np.frombuffer(b"torch.float16", np.uint8),
    **{flag: np.array(0, np.uint8) for flag in flags},
  }


def gptq_config(**changes):
  return {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False} | changes


def ct_config(**changes):
  weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64, "actorder": None}
  group = {"targets": ["Linear"], "weights": weights | changes, "input_activations": None}
  return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}


def write(folder: Path, layers: dict[str, dict[str, np.ndarray]], others=None):
  tensors = {f"{name}.{leaf}": np.array(t, order="C") for name, leaves in layers.items() for leaf, t in leaves.items()}
  save_file(tensors | (others or {}), folder / "model.safetensors")


def read(folder: Path, quantization, tensors, k, n):
  """One layer, read as load_model reads each."""
  write(folder, {"x": tensors})
  layers = quantized_layers({"quantization_config": quantization}, Checkpoint(folder))
  for name, shape in layers.shapes("x", k, n).items():
    assert layers.checkpoint.shape(name) == shape
  return layers.read("x", k, n, jax.devices()[0])


def assert_exact(packed, weight: Weight):
  np.testing.assert_array_equal(unpack(packed).dequantize(), weight.dequantized())


SIZES = pytest.mark.parametrize("group_size", [32, 64, 128, None])


@SIZES
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("writer", ["version 2", "gptqmodel", "autogptq"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(tmp_path, rng, group_size, bits, writer, act_order):
  k, n = 256, 64
  weight = random_weight(rng, k, n, group_size, bits=bits, act_order=act_order)
  quantization = gptq_config(
    bits=bits,
    group_size=group_size or -1,
    desc_act=act_order,
    checkpoint_format="gptq_v2" if writer == "version 2" else "gptq",
    meta={"quantizer": ["gptqmodel:7.7.0"]} if writer == "gptqmodel" else {},
  )
  packed = read(tmp_path, quantization, gptq_tensors(weight, writer), k, n)
  assert packed.bits == bits and packed.group_size == (group_size or k)
  assert (packed.permutation is not None) == (act_order and group_size is not None)
  assert (weight.zeros == 0).any()  # where writers disagree
  assert_exact(packed, weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("labelled", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("writer", ["version 2", "autogptq"])
def test_gptq_symmetric_of_either_version_whatever_its_label(tmp_path, rng, bits, labelled, writer):
  weight = random_weight(rng, 128, 64, 32, bits=bits, symmetric=True)
  quantization = gptq_config(bits=bits, group_size=32, sym=True, checkpoint_format=labelled)
  packed = read(tmp_path, quantization, gptq_tensors(weight, writer), 128, 64)
  assert packed.zeros is None
  assert_exact(packed, weight)


@SIZES
def test_awq(tmp_path, rng, group_size):
  weight = random_weight(rng, 256, 96, group_size)
  packed = read(tmp_path, AWQ_CONFIG | {"group_size": group_size or -1}, awq_tensors(weight), 256, 96)
  assert_exact(packed, weight)


@SIZES
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [dict(symmetric=True), dict(), dict(unpacked_zeros=True), dict(grouped=True)], ids=str)
def test_compressed_tensors(tmp_path, rng, group_size, bits, kind):
  symmetric, grouped = (kind.get(key, False) for key in ("symmetric", "grouped"))
  weight = random_weight(rng, 256, 64, group_size, bits=bits, symmetric=symmetric, act_order=grouped)
  quantization = ct_config(
    num_bits=bits,
    symmetric=symmetric,
    strategy="group" if group_size else "channel",
    group_size=group_size,
    actorder="group" if grouped else "static",
  )
  packed = read(tmp_path, quantization, ct_tensors(weight, **kind), 256, 64)
  assert (packed.zeros is None) == symmetric
  assert_exact(packed, weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_compressed_tensors_is_written_as_specified(tmp_path, rng, bits, act_order):
  weight = random_weight(rng, 256, 64, 32, bits=bits, act_order=act_order)
  want = ct_tensors(weight, grouped=act_order)
  quantization = ct_config(num_bits=bits, group_size=32, actorder="group" if act_order else None)
  packed = read(tmp_path, quantization, want, 256, 64)
  written = compressed_tensors.encode(unpack(packed))
  assert written.keys() == want.keys()
  for name, tensor in want.items():
    np.testing.assert_array_equal(written[name], tensor, err_msg=name, strict=True)
  kinds = {"a": (QuantSpec(bits=bits, group_size=32, symmetric=False), act_order), "b": (QuantSpec(), False)}
  settings = compressed_tensors.quantization_config(kinds, ["lm_head"])
  assert [group["targets"] for group in settings["config_groups"].values()] == [["a"], ["b"]]
  write(tmp_path, {"a": written})
  layers = quantized_layers({"quantization_config": settings}, Checkpoint(tmp_path))
  assert_exact(layers.read("a", 256, 64, jax.devices()[0]), weight)


@pytest.mark.parametrize(
  "k, n, zero, message",
  [(250, 64, 8, "K=250 must be a multiple of 8"), (256, 60, 8, "N=60 must"), (256, 64, 7.5, "must be whole numbers")],
)
def test_what_compressed_tensors_cannot_say(k, n, zero, message):
  codes, ones = jnp.zeros((k, n), jnp.uint8), jnp.ones((1, n))
  with pytest.raises(ValueError, match=message):
    compressed_tensors.encode(QuantizedTensor(codes=codes, scales=ones, zeros=zero * ones))


@SIZES
@pytest.mark.parametrize("bits", [4, 8])
def test_hqq(tmp_path, rng, group_size, bits):
  weight = random_weight(rng, 256, 48, group_size, bits=bits, fractional=True)
  assert_exact(read(tmp_path, None, hqq_tensors(weight), 256, 48), weight)


# Whole models: the layers of tests/data's GPTQ checkpoint, with other weights.

SHAPES = {"q_proj": (256, 256), "k_proj": (256, 128), "v_proj": (256, 128), "o_proj": (256, 256)}
SHAPES |= {"gate_proj": (256, 512), "up_proj": (256, 512), "down_proj": (512, 256)}
LAYER = "model.layers.0.self_attn.k_proj"

MODELS = {
  "gptq": (gptq_config(bits=8, desc_act=True), dict(bits=8, act_order=True), lambda w: gptq_tensors(w, "autogptq")),
  "awq": (AWQ_CONFIG, dict(), awq_tensors),
  "ct": (ct_config(actorder="group"), dict(act_order=True), lambda w: ct_tensors(w, grouped=True)),
  "hqq": (None, dict(fractional=True), hqq_tensors),
}


def write_model(name: str, folder: Path):
  quantization, kind, tensors_of = MODELS[name]
  rng, weights, layers = np.random.default_rng(5), {}, {}
  others = load_file(BASE / "model.safetensors")
  for layer in sorted({tensor.rpartition(".")[0] for tensor in others if tensor.endswith(".qweight")}):
    weights[layer] = random_weight(rng, *SHAPES[layer.rpartition(".")[2]], 64, **kind)
    layers[layer] = tensors_of(weights[layer])
  quantized = ("qweight", "qzeros", "scales", "g_idx")
  write(folder, layers, {name: t for name, t in others.items() if not name.endswith(quantized)})
  config = json.loads((BASE / "config.json").read_text())
  config.pop("quantization_config")
  if quantization is not None:
    config["quantization_config"] = quantization
  (folder / "config.json").write_text(json.dumps(config))
  return folder, weights


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_exact_and_computes(tmp_path, name):
  folder, weights = write_model(name, tmp_path)
  model = load_model(folder)
  layers = layers_of(model)
  assert layers.keys() == weights.keys()
  for layer, weight in weights.items():
    assert_exact(layers[layer].packed, weight)
  assert jnp.isfinite(model(jnp.arange(6)[None])).all()


def test_layers_of_8_4_and_16_bits_in_one_model(tmp_path):
  folder, weights = write_model("gptq", tmp_path)
  rng, tensors = np.random.default_rng(6), load_file(folder / "model.safetensors")
  four, sixteen = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"
  weights[four] = random_weight(rng, 512, 256, 128)
  tensors |= {f"{four}.{leaf}": t for leaf, t in gptq_tensors(weights[four], "autogptq").items()}
  for leaf in ("qweight", "qzeros", "scales", "g_idx"):
    del tensors[f"{sixteen}.{leaf}"]
  tensors[f"{sixteen}.weight"] = np.ones((256, 256), np.float16)
  save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / "model.safetensors")
  config = json.loads((folder / "config.json").read_text())
  dynamic = {rf"+:{four}": {"bits": 4, "group_size": 128, "desc_act": False}, rf"-:{sixteen}": {}}
  config["quantization_config"]["dynamic"] = dynamic
  (folder / "config.json").write_text(json.dumps(config))
  model = load_model(folder)
  layers = layers_of(model)
  assert layers.keys() == weights.keys() - {sixteen}
  assert sorted({layer.packed.bits for layer in layers.values()}) == [4, 8]
  assert_exact(layers[four].packed, weights[four])
  assert (model.layers[1].attention.q_proj.kernel[...] == 1).all()
  assert jnp.isfinite(model(jnp.arange(6)[None])).all()


def value(new):
  def change(tensor):
    tensor = tensor.copy()
    tensor.flat[3 % tensor.size] = new
    return tensor

  return change


def astype(dtype):
  return lambda tensor: tensor.astype(dtype)


WRONG_TENSORS = [
  *(
    (name, leaf, change, message)
    for name, codes, scales, zeros in (
      ("gptq", "qweight", "scales", "qzeros"),
      ("awq", "qweight", "scales", "qzeros"),
      ("ct", "weight_packed", "weight_scale", "weight_zero_point"),
      ("hqq", "W_q", "scale", "zero"),
    )
    for leaf, change, message in (
      (codes, None, "is missing"),
      (codes, astype(np.int64), "is int64, must be"),
      (codes, lambda t: t[:-1], "must have"),
      (scales, None, "is missing"),
      (scales, astype(np.float64), "is float64, must be bfloat16, float16 or float32"),
      (scales, value(0), "has zeros, scales must not be zero"),
      (scales, value(np.nan), "has NaN or infinite values"),
      (scales, lambda t: t[:-1], "must have"),
      (zeros, None, "is missing"),
      (zeros, lambda t: t[:-1], "must have"),
      (zeros, astype(np.int16), "is int16, must be"),
    )
  ),
  ("gptq", "g_idx", value(4), "has values from 0 to 4, must be groups from 0 to 3"),
  ("gptq", "g_idx", value(-1), "has values from -1 to 3, must be groups from 0 to 3"),
  ("gptq", "g_idx", None, "is missing"),
  ("ct", "weight_g_idx", value(4), "has values from 0 to 4, must be groups from 0 to 3"),
  ("ct", "weight_g_idx", None, "is missing"),
  ("ct", "weight_g_idx", astype(np.int64), "is int64, must be int32"),
  ("ct", "weight_shape", value(7), "must hold"),
  ("hqq", "zero", value(np.inf), "has NaN or infinite values"),
  ("hqq", "shape", value(7), "must hold"),
  ("hqq", "axis", None, "is missing"),
  ("hqq", "nbits", lambda t: t.reshape(1), r"has shape \(1,\), must have \(\)"),
  ("hqq", "group_size", astype(np.float32), "is float32, must be"),
  ("hqq", "group_size", lambda t: t * 2, "must have"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return {name: write_model(name, tmp_path_factory.mktemp(name))[0] for name in MODELS}


@pytest.mark.parametrize("name, leaf, change, message", WRONG_TENSORS)
def test_a_wrong_tensor_is_named(tmp_path, whole, name, leaf, change, message):
  tensors = load_file(whole[name] / "model.safetensors")
  tensor = f"{LAYER}.{leaf}"
  if change is None:
    del tensors[tensor]
  else:
    tensors[tensor] = np.array(change(tensors[tensor]), order="C")
  save_file(tensors, tmp_path / "model.safetensors")
  shutil.copyfile(whole[name] / "config.json", tmp_path / "config.json")
  with pytest.raises(CheckpointError, match=message) as error:
    load_model(tmp_path)
  assert LAYER in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_a_truncated_file_and_one_outside_the_folder(tmp_path, whole, name):
  shutil.copyfile(whole[name] / "config.json", tmp_path / "config.json")
  content = (whole[name] / "model.safetensors").read_bytes()
  (tmp_path / "model.safetensors").write_bytes(content[:-1000])
  with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
    load_model(tmp_path)
  (tmp_path / "model.safetensors").unlink()
  (tmp_path / "weights.safetensors").symlink_to(whole[name] / "model.safetensors")
  with pytest.raises(CheckpointError, match=r"'weights\.safetensors' lies outside the folder"):
    load_model(tmp_path)


@pytest.mark.parametrize(
  "name, path, change, message",
  [
    ("gptq", (), {"group_size": 32}, r"must have \(8, \d+\)"),
    ("gptq", (), {"bits": 4}, r"must have \(32, \d+\)"),
    ("gptq", (), {"group_size": 48}, "group_size=48 does not divide k=256"),
    ("gptq", (), {"sym": None}, "symmetry None, must be"),
    ("awq", (), {"group_size": 32}, r"must have \(8, \d+\)"),
    ("awq", (), {"bits": "4"}, "'4' bits"),
    ("ct", ("config_groups", "group_0", "weights"), {"group_size": 32}, r"must have \(\d+, 8\)"),
    ("ct", ("config_groups", "group_0", "weights"), {"num_bits": 8}, r"must have \(\d+, 64\)"),
    ("ct", ("config_groups", "group_0", "weights"), {"symmetric": True}, "weight_zero_point .*is unexpected"),
    ("ct", ("config_groups", "group_0", "weights"), {"actorder": None}, "weight_g_idx .*is unexpected"),
  ],
)
def test_settings_that_contradict_the_tensors(tmp_path, whole, name, path, change, message):
  shutil.copytree(whole[name], tmp_path, dirs_exist_ok=True)
  config = json.loads((tmp_path / "config.json").read_text())
  target = config["quantization_config"]
  for key in path:
    target = target[key]
  target |= change
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(CheckpointError, match=message):
    load_model(tmp_path)


@pytest.mark.parametrize("leaf, new, message", [("axis", 0, "its axis is 0"), ("view_as_float", 1, "view_as_float")])
def test_what_hqq_can_do_and_we_cannot_is_refused(tmp_path, whole, leaf, new, message):
  tensors = load_file(whole["hqq"] / "model.safetensors")
  tensors[f"{LAYER}.{leaf}"] = np.array(new, tensors[f"{LAYER}.{leaf}"].dtype)
  save_file(tensors, tmp_path / "model.safetensors")
  shutil.copyfile(whole["hqq"] / "config.json", tmp_path / "config.json")
  with pytest.raises(NotImplementedError, match=message):
    load_model(tmp_path)
