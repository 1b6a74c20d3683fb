# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written by the tools themselves: their own dequantized weights, recorded logits and greedy tokens.

A few small ones lie in tests/data; the others beside the repository, in shared/checkpoints, on machines that have it.
"""

import functools
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax import ops
from marlin_jax.checkpoint import load_model, save_model
from marlin_jax.checkpoint.huggingface import tensor_name
from marlin_jax.console import describe_matmuls
from marlin_jax.generation.loop import generate_tokens
from marlin_jax.generation.sampling import Sampling
from marlin_jax.models import unfuse
from marlin_jax.nnx import QuantLinear
from marlin_jax.packing import unpack, unstack
from marlin_jax.quantization import quantize
from marlin_jax.quantized import SparsePackedTensor
from pallas_kernels import matmul

DATA = Path(__file__).parents[2] / "data"
ROOTS = [DATA, *(parent / "shared" / "checkpoints" for parent in DATA.parents)]
# name -> (bits, has zero points, has act-order)
QUANTIZED = {
  "gptq-int4-g128-sym": (4, False, False),
  "gptq-int4-g128-sym-descact": (4, False, True),
  "gptq-int4-g128-asym": (4, True, False),
  "gptq-int8-g128-sym": (8, False, False),
  "awq-int4-g128-gemm": (4, True, False),
  "ct-int4-g128-sym": (4, False, False),
  "ct-int4-g128-asym": (4, True, False),
  "ct-int8-channel-sym": (8, False, False),
  "marlin-orig-g128": (4, False, False),
  "hqq-int4-g64-axis1": (4, True, False),
  "ctold-marlin24-int4-g128": (4, False, False),
}
ALL = pytest.mark.parametrize("name", QUANTIZED)

forward = nnx.jit(lambda model, tokens: model(tokens))


@pytest.fixture
def folder(name):
  return folder_of(name)


def folder_of(name):
  for root in ROOTS:
    if (root / name / "config.json").exists():
      return root / name
  pytest.skip(f"there is no {name} here")


@functools.cache
def model_in(folder):
  return load_model(folder, dtype=jnp.float32)


def quantized_layers(model) -> dict[str, QuantLinear]:
  return {tensor_name(p): layer for p, layer in nnx.iter_modules(model) if isinstance(layer, QuantLinear)}


@ALL
def test_dequantized_weights_are_the_tools_own(folder):
  hashes = {}
  for name, layer in quantized_layers(model_in(folder)).items():
    w = np.asarray(unpack(layer.packed).dequantize()).T
    hashes[f"{name}.weight"] = hashlib.sha256(np.ascontiguousarray(w, "<f4").tobytes()).hexdigest()
  assert hashes == json.loads((folder / "dequant_sha256.json").read_text())


@ALL
def test_the_fields_are_those_that_the_format_needs(name, folder):
  layers = quantized_layers(model_in(folder)).values()
  assert len(layers) == 14
  bits, zeros, act_order = QUANTIZED[name]
  assert {layer.packed.bits for layer in layers} == {bits}
  assert any(layer.zeros is not None for layer in layers) == zeros
  assert any(layer.permutation is not None for layer in layers) == act_order


@ALL
def test_logits_and_greedy_tokens_are_the_recorded_ones(folder):
  assert_recorded(model_in(folder), folder)


def assert_recorded(model, folder, file="logits_fp32_ref.npz"):
  recorded = np.load(folder / file)
  logits = forward(model, jnp.asarray(recorded["input_ids"], jnp.int32))
  np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-4)
  rows, length = recorded["input_ids"].shape
  generated = [[] for _ in range(rows)]
  for chunk in generate_tokens(
    model, recorded["input_ids"].tolist(), max_new_tokens=16, sampling=Sampling(), eos_token_ids=(), chunk=16
  ):
    for row, tokens in zip(generated, chunk, strict=True):
      row.extend(tokens)
  assert generated == recorded["greedy_ids"][:, length:].tolist()


def test_sparse_weights_of_4_bits_stay_sparse():
  layers = quantized_layers(model_in(folder_of("ctold-marlin24-int4-g128"))).values()
  assert all(isinstance(layer.packed, SparsePackedTensor) for layer in layers)


def test_sparse_floats_are_the_tools_own_weights_logits_and_tokens():
  folder = folder_of("ctold-sparse24-bitmask")
  model = load_model(folder, dtype=jnp.float32)
  assert not quantized_layers(model)
  hashes = json.loads((folder / "dequant_sha256.json").read_text())
  kernels = {
    f"{tensor_name(path)}.weight": layer.kernel[...]
    for path, layer in nnx.iter_modules(model)
    if path[-1:] and isinstance(layer, nnx.Linear)
  }
  assert len(hashes) == 14 and hashes.keys() < kernels.keys()
  for name, expected in hashes.items():
    w = np.ascontiguousarray(np.asarray(kernels[name]).T, "<f4")
    assert hashlib.sha256(w.tobytes()).hexdigest() == expected, name
    assert ((w.reshape(w.shape[0], -1, 4) != 0).sum(-1) <= 2).all()
  assert_recorded(model, folder)


def test_logits_and_greedy_tokens_with_a_key_head_for_every_query_head_are_the_recorded_ones():
  folder = folder_of("llama-mha-bf16")
  assert_recorded(load_model(folder, dtype=jnp.float32), folder, "logits_fp32.npz")


def test_logits_and_greedy_tokens_of_a_mixture_of_experts_are_the_recorded_ones():
  folder = folder_of("qwen3moe-bf16")
  model = load_model(folder, dtype=jnp.float32)
  assert model.layers[0].mlp.experts.up_proj.kernel.shape == (8, 128, 64)
  assert_recorded(model, folder, "logits_fp32.npz")
  fp32, bf16 = (np.load(folder / f"logits_{dtype}.npz") for dtype in ("fp32", "bf16"))
  logits = np.asarray(forward(load_model(folder), jnp.asarray(fp32["input_ids"], jnp.int32)))
  ours, theirs = (np.sqrt(np.mean((x - fp32["logits"]) ** 2)) for x in (logits, bf16["logits"]))
  assert 0 < ours <= theirs


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_a_quantized_mixture_of_experts_is_close_and_comes_back(method, tmp_path):
  folder = folder_of("qwen3moe-bf16")
  recorded = np.load(folder / "logits_fp32.npz")
  tokens = jnp.asarray(recorded["input_ids"], jnp.int32)

  def error(model):
    # The median over tokens: rounding sends one that is between two experts to the other, and its logits elsewhere.
    difference, norm = (
      np.linalg.norm(x, axis=-1) for x in (forward(model, tokens) - recorded["logits"], recorded["logits"])
    )
    return np.median(difference / norm)

  # 64 and not 128, which does not divide the 64 inputs of an expert's down_proj.
  eight, four = (
    quantize(load_model(folder, dtype=jnp.float32), method=method, bits=bits, group_size=64, progress=False)
    for bits in (8, 4)
  )
  assert error(eight) < 0.01 < error(four) < 0.15
  for format in ("native", "compressed-tensors") if method == "rtn" else ("native",):
    save_model(four, tmp_path / format, format=format)
    assert_same_state(load_model(tmp_path / format, dtype=jnp.float32), four)
  dense = load_model(folder, dtype=jnp.float32)
  for path, layer in nnx.iter_modules(four):
    if isinstance(layer, QuantLinear):
      parent = functools.reduce(lambda p, name: p[name] if isinstance(name, int) else getattr(p, name), path, dense)
      weights = jnp.stack([unpack(w).dequantize() for w in unstack(layer.packed)])
      parent.kernel[...] = weights if layer.packed.stack else weights[0]
  np.testing.assert_allclose(forward(four, tokens), forward(dense, tokens), rtol=0, atol=1e-4)


@ALL
def test_saved_in_our_format_it_is_the_same_model(folder, tmp_path):
  model = model_in(folder)
  save_model(model, tmp_path / "saved")
  # `generate` may have fused the projections of this one, which the tests share.
  assert_same_state(unfuse(nnx.merge(*nnx.split(model))), load_model(tmp_path / "saved", dtype=jnp.float32))


def assert_same_state(*models):
  a, b = (dict(nnx.to_flat_state(nnx.state(m))) for m in models)
  assert a.keys() == b.keys()
  for path, variable in a.items():
    np.testing.assert_array_equal(variable[...], b[path][...], err_msg=str(path), strict=True)


@pytest.mark.gpu
@ALL
def test_on_a_gpu_the_kernel_computes_it(folder, monkeypatch):
  recorded = np.load(folder / "logits_fp32_ref.npz")
  tokens = jnp.asarray(recorded["input_ids"], jnp.int32)

  def error():
    model = load_model(folder, dtype=jnp.bfloat16)
    jax.clear_caches()  # what was compiled with the other implementation
    logits = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, tokens), np.float32)
    return np.linalg.norm(logits - recorded["logits"]) / np.linalg.norm(recorded["logits"])

  by_kernel = error()
  model = load_model(folder, dtype=jnp.bfloat16)
  assert "Pallas kernel" in describe_matmuls(model)
  text = list(
    generate_tokens(
      model,
      recorded["input_ids"].tolist(),
      max_new_tokens=16,
      sampling=Sampling(),
      eos_token_ids=(),
      chunk=16,
    )
  )
  assert [sum(map(len, row)) for row in zip(*text, strict=True)] == [16] * len(tokens)
  monkeypatch.setattr(
    ops, "matmul", lambda *args, **options: matmul(*args, **options | {"implementation": "reference"})
  )
  by_rounding = error()  # what bfloat16 costs by itself
  assert by_kernel < 1.25 * by_rounding < 0.1
