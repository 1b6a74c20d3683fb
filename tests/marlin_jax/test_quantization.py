# SPDX-License-Identifier: Apache-2.0
"""One word for every method, on a model in memory and on a folder; the maths is tested beside the quantizers."""

import functools
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from marlin_jax import (
  Awq,
  Gptq,
  QuantLinear,
  generate,
  load_model,
  quantize,
  quantize_checkpoint,
  save_model,
  unpack,
)

LLAMA = Path(__file__).parent.parent / "data" / "llama-bf16"
SEQUENCES = np.random.default_rng(0).integers(0, 512, (4, 32)).tolist()
TEXTS = ["the quick brown fox jumps over the lazy dog " * 20]
# What `quantize` and `quantize_checkpoint` are asked for.
ALL = {
  "rtn": dict(method="rtn"),
  "hqq": dict(method="hqq"),
  "gptq": dict(method=Gptq(act_order=True, damping=0.1), calibration=SEQUENCES),
  "awq": dict(method="awq", calibration=TEXTS, calibration_count=3, calibration_length=32, symmetric=False),
  "sparse24-gptq": dict(method="gptq", calibration=SEQUENCES, sparse24=True),
  "sparse24-wanda": dict(method="wanda", calibration=SEQUENCES, sparse24=True),
}


@pytest.fixture(scope="module")
def in_memory(small_checkpoint):
  """name -> the model, quantized in memory."""
  return functools.cache(
    lambda name: quantize(load_model(small_checkpoint), group_size=64, progress=False, **ALL[name])
  )


def layers(model):
  return [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, QuantLinear)]


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_quantized_in_a_folder_is_the_model_quantized_in_memory(
  name, in_memory, small_checkpoint, tmp_path
):
  quantize_checkpoint(small_checkpoint, tmp_path / "out", group_size=64, progress=False, **ALL[name])
  loaded, model = load_model(tmp_path / "out"), in_memory(name)
  assert len(layers(model)) == len(layers(loaded)) == 14
  for a, b in zip(layers(model), layers(loaded), strict=True):
    np.testing.assert_array_equal(a.qweight[...], b.qweight[...])
    np.testing.assert_array_equal(a.scales[...], b.scales[...])
    assert (a.meta is not None) == (b.meta is not None) == name.startswith("sparse24")
    assert a.meta is None or (a.meta[...] == b.meta[...]).all()
    assert (a.zeros is not None) == (b.zeros is not None) == (name in ("hqq", "awq"))
    assert (a.permutation is not None) == (b.permutation is not None) == (name == "gptq")
  assert len(generate(loaded, [[1, 2, 3]], max_new_tokens=2)[0]) == 2


def test_a_sparse_model_goes_on_as_before_when_it_was_saved(small_checkpoint, tmp_path):
  model = quantize(load_model(small_checkpoint), group_size=64, progress=False, **ALL["sparse24-gptq"])
  save_model(model, tmp_path / "out")
  before, after = (generate(m, [[1, 2, 3]], max_new_tokens=8) for m in (model, load_model(tmp_path / "out")))
  assert before == after and len(after[0]) == 8


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_what_calibration_made_goes_out_as_compressed_tensors(name, in_memory, tmp_path):
  save_model(in_memory(name), tmp_path / "theirs", format="compressed-tensors")
  for a, b in zip(layers(in_memory(name)), layers(load_model(tmp_path / "theirs")), strict=True):
    np.testing.assert_array_equal(unpack(a.packed).dequantize(), unpack(b.packed).dequantize())


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(method="sparsegpt"), "method='sparsegpt' must be one of rtn, hqq, gptq, awq, wanda"),
    (dict(method="gptq"), "method='gptq' needs calibration"),
    (dict(method=Awq()), r"method=Awq\(\) needs calibration"),
    (dict(method="rtn", calibration=TEXTS), "method='rtn' looks at no data"),
    (dict(method="hqq", symmetric=True), "symmetric=True must be False"),
    (dict(method="gptq", calibration="one text"), "calibration is one string"),
    (dict(method="gptq", calibration=[]), "sequences is empty"),
  ],
)
def test_what_makes_no_sense_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    quantize(load_model(LLAMA), progress=False, **options)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(method="hqq", symmetric=True), "sparse24 is not implemented for quantize_hqq"),
    (dict(method="awq", calibration=SEQUENCES), "sparse24 is not implemented for awq"),
  ],
)
def test_methods_that_make_no_sparse_weights_say_so(options, message):
  with pytest.raises(NotImplementedError, match=message):
    quantize(load_model(LLAMA), sparse24=True, progress=False, **options)


def test_settings_that_do_not_go_together_are_refused():
  options = dict(calibration=SEQUENCES, progress=False)
  with pytest.raises(ValueError, match="wanda chooses what to prune: it needs sparse24=True"):
    quantize(load_model(LLAMA), method="wanda", **options)
  with pytest.raises(ValueError, match="act_order=True must be False with sparse24"):
    quantize(load_model(LLAMA), method=Gptq(act_order=True), sparse24=True, **options)


def test_calibration_needs_a_decoder_and_text_a_tokenizer():
  with pytest.raises(ValueError, match="model is a Linear, must be a Decoder"):
    quantize(nnx.Linear(128, 8, rngs=nnx.Rngs(0)), method="gptq", calibration=SEQUENCES)
  model = load_model(LLAMA)
  model.tokenizer = None
  with pytest.raises(ValueError, match=r"model\.tokenizer is None"):
    quantize(model, method="gptq", calibration=TEXTS)


def test_a_format_that_cannot_hold_the_zero_points_leaves_nothing_behind(tmp_path):
  with pytest.raises(ValueError, match="zero points must be whole numbers"):
    quantize_checkpoint(LLAMA, tmp_path / "out", method="hqq", format="compressed-tensors", progress=False)
  assert not list(tmp_path.iterdir())
