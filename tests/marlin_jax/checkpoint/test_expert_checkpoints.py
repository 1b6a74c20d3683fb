# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a mixture of experts, of every format: one tensor an expert in the file, a stack in memory."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from marlin_jax import quantize, unpack
from marlin_jax.checkpoint import CheckpointError, load_model, open_checkpoint, quantize_tensors, save_model
from marlin_jax.console import describe_checkpoint, describe_matmuls
from marlin_jax.models import fuse
from marlin_jax.packing import unstack
from marlin_jax.quantization import quantize_checkpoint
from marlin_jax.quantized import QuantSpec
from tests.marlin_jax.checkpoint.test_formats_by_specification import (
  AWQ_CONFIG,
  awq_tensors,
  ct_config,
  ct_tensors,
  gptq_config,
  gptq_tensors,
  hqq_tensors,
  random_weight,
)
from tests.marlin_jax.checkpoint.test_save_model import assert_same_state, assert_same_tensors
from tests.marlin_jax.small_moe import SMALL_MOE, small_moe

EXPERTS = "model.layers.0.mlp.experts"
PARTS = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}  # K, N

forward = nnx.jit(lambda model: model(jnp.arange(12).reshape(2, 6)))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("moe") / "float"
  save_model(small_moe(jnp.bfloat16), folder)
  return folder


def test_a_float_file_has_a_tensor_for_every_expert(source):
  tensors = open_checkpoint(source)
  kernels = small_moe(jnp.bfloat16).layers[0].mlp.experts
  names = {f"{EXPERTS}.{e}.{part}.weight" for e in range(6) for part in PARTS}
  assert {name for name in tensors if ".experts" in name} == names and "model.layers.0.mlp.gate.weight" in tensors
  for e in range(6):
    for part in PARTS:
      np.testing.assert_array_equal(tensors[f"{EXPERTS}.{e}.{part}.weight"].T, getattr(kernels, part).kernel[e])
  assert_same_state(load_model(source), small_moe(jnp.bfloat16))


@pytest.mark.parametrize("options", [dict(), dict(bits=8, symmetric=False), dict(sparse24=True)], ids=str)
def test_load_quantize_save_load_gives_the_same_model(source, tmp_path, options):
  model = quantize(load_model(source), group_size=32, progress=False, **options)
  expected = forward(model)
  save_model(fuse(model), tmp_path / "saved")
  again = load_model(tmp_path / "saved")
  assert again.config == SMALL_MOE and again.layers[0].mlp.experts.up_proj.packed.stack == (6,)
  assert f"{EXPERTS}.5.down_proj.qweight" in open_checkpoint(tmp_path / "saved")
  assert_same_state(again, quantize(load_model(source), group_size=32, progress=False, **options))
  np.testing.assert_array_equal(forward(again), expected)


@pytest.mark.parametrize("options", [dict(), dict(symmetric=False), dict(sparse24=True)], ids=str)
def test_streaming_writes_what_the_model_in_memory_would(source, tmp_path, options):
  save_model(quantize(load_model(source), group_size=32, progress=False, **options), tmp_path / "memory")
  quantize_tensors(source, tmp_path / "streamed", QuantSpec(group_size=32, **options), progress=False)
  assert_same_tensors(tmp_path / "memory", tmp_path / "streamed")


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_holds_the_same_weights(source, tmp_path, symmetric):
  quantize_checkpoint(source, tmp_path / "ours", group_size=16, symmetric=symmetric, progress=False)
  options = dict(format="compressed-tensors", group_size=16, symmetric=symmetric, progress=False)
  quantize_checkpoint(source, tmp_path / "streamed", **options)
  save_model(load_model(tmp_path / "ours"), tmp_path / "memory", format="compressed-tensors")
  assert_same_tensors(tmp_path / "streamed", tmp_path / "memory")
  assert_same_state(load_model(tmp_path / "ours"), load_model(tmp_path / "memory"))
  tensors = open_checkpoint(tmp_path / "memory")
  for e in range(6):
    for part, (k, n) in PARTS.items():
      assert tensors[f"{EXPERTS}.{e}.{part}.weight_packed"].shape == (n, k // 8)
  for folder in ("streamed", "memory"):
    settings = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
    assert set(settings["ignore"]) == {"lm_head", "model.layers.0.mlp.gate"}
    assert [group["targets"] for group in settings["config_groups"].values()] == [["Linear"]]


def write_quantized(source, folder, config, encode):
  """The float checkpoint with its experts in the tensors that `encode` makes of random weights, which are returned."""
  rng = np.random.default_rng(0)
  tensors, weights = dict(load_file(source / "model.safetensors")), {}
  for e in range(6):
    for part, (k, n) in PARTS.items():
      name = f"{EXPERTS}.{e}.{part}"
      del tensors[f"{name}.weight"]
      weights[e, part], leaves = encode(rng, e, k, n)
      tensors |= {f"{name}.{leaf}": np.array(tensor, order="C") for leaf, tensor in leaves.items()}
  folder.mkdir()
  save_file(tensors, folder / "model.safetensors")
  settings = json.loads((source / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(settings | config))
  return weights


def gptq(rng, expert, k, n):
  # Of one layer some experts have zero points and some have not, and the same with act-order.
  weight = random_weight(rng, k, n, 16, symmetric=expert < 2, act_order=expert > 3)
  return weight, gptq_tensors(weight, "version 2")


def awq(rng, expert, k, n):
  weight = random_weight(rng, k, n, 16)
  return weight, awq_tensors(weight)


def compressed(rng, expert, k, n):
  weight = random_weight(rng, k, n, 16, act_order=True)
  return weight, ct_tensors(weight, grouped=True)


def hqq(rng, expert, k, n):
  weight = random_weight(rng, k, n, 16, fractional=True)
  return weight, hqq_tensors(weight)


@pytest.mark.parametrize(
  "config, encode",
  [
    (gptq_config(group_size=16, checkpoint_format="gptq_v2"), gptq),
    (AWQ_CONFIG | {"group_size": 16}, awq),
    (ct_config(group_size=16, actorder="group"), compressed),
    (None, hqq),
  ],
  ids=["gptq", "awq", "compressed-tensors", "hqq"],
)
def test_experts_that_other_tools_packed_one_by_one(source, tmp_path, config, encode):
  config = {"quantization_config": config} if config else {}
  weights = write_quantized(source, tmp_path / "packed", config, encode)
  model = load_model(tmp_path / "packed", dtype=jnp.float32)
  experts = model.layers[0].mlp.experts
  assert isinstance(model.layers[0].mlp.router, nnx.Linear) and isinstance(model.layers[1].mlp.up_proj, nnx.Linear)
  for part in PARTS:
    for e, w in enumerate(unstack(getattr(experts, part).packed)):
      np.testing.assert_array_equal(unpack(w).dequantize(), weights[e, part].dequantized(), err_msg=f"{e} {part}")
  expected = forward(model)
  save_model(fuse(model), tmp_path / "saved")
  np.testing.assert_array_equal(forward(load_model(tmp_path / "saved", dtype=jnp.float32)), expected)
  assert "18 quantized layers" in describe_checkpoint(tmp_path / "saved")
  assert "18 quantized layers" in describe_matmuls(load_model(tmp_path / "saved"))
  assert ", 2 of 6 experts a token" in describe_checkpoint(source)


def changed(source, folder, change):
  folder.mkdir()
  tensors = dict(load_file(source / "model.safetensors"))
  change(tensors)
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text((source / "config.json").read_text())
  return folder


def test_a_missing_or_surplus_expert_is_named(source, tmp_path):
  name = f"{EXPERTS}.5.up_proj.weight"
  with pytest.raises(CheckpointError, match=re.escape(f"tensor {name} of shape (32, 64) is missing")):
    load_model(changed(source, tmp_path / "missing", lambda tensors: tensors.pop(name)))
  surplus = f"{EXPERTS}.6.up_proj.weight"
  with pytest.raises(CheckpointError, match=f"tensor {surplus} of shape .* is unexpected"):
    load_model(changed(source, tmp_path / "surplus", lambda tensors: tensors.update({surplus: tensors[name]})))


def test_one_tensor_for_all_experts_is_refused(source, tmp_path):
  def stacked(tensors):
    gate_up = [
      np.concatenate([tensors.pop(f"{EXPERTS}.{e}.{p}_proj.weight") for p in ("gate", "up")]) for e in range(6)
    ]
    tensors[f"{EXPERTS}.gate_up_proj"] = np.stack(gate_up)

  with pytest.raises(NotImplementedError, match=f"tensor {EXPERTS}.gate_up_proj holds all experts of a layer"):
    load_model(changed(source, tmp_path / "stacked", stacked))


def test_experts_that_are_quantized_in_part_are_refused(source, tmp_path):
  quantize_tensors(source, tmp_path / "quantized", QuantSpec(group_size=32), progress=False)
  tensors, name = dict(load_file(tmp_path / "quantized" / "model.safetensors")), f"{EXPERTS}.3.up_proj"
  for leaf in ("qweight", "scales"):
    del tensors[f"{name}.{leaf}"]
  tensors[f"{name}.weight"] = load_file(source / "model.safetensors")[f"{name}.weight"]
  save_file(tensors, tmp_path / "quantized" / "model.safetensors")
  message = f"layers {EXPERTS}.0.up_proj and {name} are not quantized alike, which is not supported"
  with pytest.raises(NotImplementedError, match=re.escape(message)):
    load_model(tmp_path / "quantized")


def test_a_group_size_that_does_not_divide_writes_nothing(source, tmp_path):
  with pytest.raises(ValueError, match=rf"layer {EXPERTS}\.0\.down_proj: group_size=64 does not divide k=32"):
    quantize_tensors(
      source,
      tmp_path / "out",
      QuantSpec(group_size=64),
      predicate=lambda path, layer: "experts" in path,
      progress=False,
    )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["gptq", "awq", "wanda"])
def test_methods_that_are_calibrated_are_refused(method):
  options = dict(group_size=32, sparse24=method == "wanda", calibration=[[1, 2, 3]], progress=False)
  with pytest.raises(NotImplementedError, match=f"{method.title()} is not implemented for a mixture of experts"):
    quantize(small_moe(), method=method, **options)
