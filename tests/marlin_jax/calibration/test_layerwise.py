# SPDX-License-Identifier: Apache-2.0
"""GPTQ and AWQ on a tiny decoder: every layer, its inputs, what is folded, what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax import Awq, Gptq, QuantLinear, QuantSpec, convert, unpack
from marlin_jax.calibration import quantize_calibrated
from marlin_jax.calibration.inputs import LayerInputs
from marlin_jax.models import Decoder, ModelConfig, fuse

SPEC = QuantSpec(group_size=32)
DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(**changes):
  sizes = dict(
    architecture="Qwen2ForCausalLM",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    qkv_bias=True,
  )
  return ModelConfig(**sizes | changes)


def decoder(**changes):
  """A decoder with biases and norms that are not one, some features far larger than the others."""
  model = Decoder(config(**changes), dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(1))
  rng = np.random.default_rng(0)
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    if path[-1] == "scale":
      variable[...] = jnp.asarray(np.exp(rng.normal(size=variable.shape)), jnp.float32)
    if path[-1] == "bias":
      variable[...] = jnp.asarray(0.1 * rng.normal(size=variable.shape), jnp.float32)
  return model


def sequences(*lengths):
  rng = np.random.default_rng(2)
  return [rng.integers(0, 97, length).tolist() for length in lengths]


# All padded to one width, for which a program is compiled.
TEXT = sequences(64, 33, 40, 64, 64, 64, 64, 50)


@pytest.fixture(scope="module")
def quantized():
  """method -> (its report, the model), each from the same float model."""
  done = {}
  for name, method in {"gptq": Gptq(), "awq": Awq()}.items():
    model = decoder()
    done[name] = (quantize_calibrated(model, TEXT, method, SPEC), model)
  return done


def logits(model, tokens):
  return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray([tokens])))


def read_by(model, part, name, tokens):
  """What the dense layer `name` of a part of the model's is called with."""
  dense, seen = getattr(part, name), []
  setattr(part, name, lambda x: seen.append(x) or jnp.zeros((*x.shape[:-1], dense.out_features), x.dtype))

  @jax.jit
  def read(tokens):
    seen.clear()
    model(tokens)
    return seen[0][0]

  x = np.asarray(read(jnp.asarray([tokens])), np.float64)
  setattr(part, name, dense)
  return x


def test_moments_are_sums_over_the_tokens_and_not_over_padding():
  model, text = decoder(), sequences(64, 17, 3)
  layer, path = model.layers[0], ("attention", "o_proj")
  inputs = LayerInputs(model, text, jax.devices()[0])
  (moments,) = inputs.moments(layer, [path])
  # One by one, without padding.
  x = np.concatenate([read_by(model, layer.attention, "o_proj", tokens) for tokens in text])
  np.testing.assert_allclose(moments.gram, x.T @ x, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(moments.magnitude, np.abs(x).sum(0), rtol=1e-4)
  assert moments.tokens == sum(map(len, text)) == len(x)


def test_a_layer_reads_what_the_layers_before_it_give_once_they_are_quantized():
  model = decoder()
  inputs = LayerInputs(model, TEXT[:1], jax.devices()[0])
  convert(model.layers[0], SPEC)
  inputs.advance(model.layers[0])
  (moments,) = inputs.moments(model.layers[1], [("mlp", "up_proj")])
  x = read_by(model, model.layers[1].mlp, "up_proj", TEXT[0])
  np.testing.assert_allclose(moments.gram, x.T @ x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_all_dense_layers_but_the_head_are_quantized_and_say_their_error(quantized, name):
  report, model = quantized[name]
  parts = [getattr(layer, block) for layer in model.layers for block in ("attention", "mlp")]
  layers = [getattr(part, proj) for part in parts for proj in DENSE if hasattr(part, proj)]
  assert len(layers) == 14 and all(isinstance(layer, QuantLinear) for layer in layers)
  assert {layer.path for layer in report.quantized} == {
    ("layers", i, "attention" if proj in DENSE[:4] else "mlp", proj) for i in range(2) for proj in DENSE
  }
  assert [(layer.path, layer.skipped) for layer in report.skipped] == [(("lm_head",), "the predicate says so")]
  assert all(0 < layer.output_error < 0.05 and layer.note is None for layer in report.quantized)


def test_gptq_beats_rounding_to_nearest_on_every_layer_and_at_the_logits(quantized):
  """The errors of both on the same inputs: those of the model that GPTQ has quantized up to there."""
  report, model = quantized["gptq"]
  errors = {layer.path: layer.output_error for layer in report.quantized}
  float_model, rounded = decoder(), decoder()
  convert(rounded, SPEC)
  inputs = LayerInputs(float_model, TEXT, jax.devices()[0])
  for i, layer in enumerate(model.layers):
    paths = [path[2:] for path in errors if path[1] == i]
    for path, moments in zip(paths, inputs.moments(layer, paths), strict=True):
      w, v = (
        np.asarray(kernel, np.float64)
        for kernel in (
          getattr(getattr(float_model.layers[i], path[0]), path[1]).kernel[...],
          rounded_weight(rounded.layers[i], path),
        )
      )
      gram = np.asarray(moments.gram, np.float64)
      nearest = np.sum((w - v) * (gram @ (w - v))) / np.sum(w * (gram @ w))
      assert errors["layers", i, *path] < 0.9 * nearest, path
    inputs.advance(layer)
  held_out = sequences(60, 60)[1]
  want = logits(float_model, held_out)
  gptq, nearest = (np.mean((logits(m, held_out) - want) ** 2) for m in (model, rounded))
  assert gptq < nearest


def rounded_weight(layer, path):
  return unpack(getattr(getattr(layer, path[0]), path[1]).packed).dequantize()


def test_awq_beats_rounding_to_nearest_on_what_the_first_layer_reads(quantized):
  report, _ = quantized["awq"]
  awq = {layer.path[2:]: layer.output_error for layer in report.quantized if layer.path[1] == 0}
  model, rounded = decoder(), decoder()
  convert(rounded, SPEC)
  nearest = {}
  moments = LayerInputs(model, TEXT, jax.devices()[0]).moments(model.layers[0], list(awq))
  for path, of_path in zip(awq, moments, strict=True):
    w = np.asarray(getattr(getattr(model.layers[0], path[0]), path[1]).kernel[...], np.float64)
    error, gram = w - np.asarray(rounded_weight(rounded.layers[0], path)), np.asarray(of_path.gram, np.float64)
    nearest[path] = np.sum(error * (gram @ error)) / np.sum(w * (gram @ w))
  assert sum(awq.values()) < 0.9 * sum(nearest.values())
  assert all(awq[path] < 1.02 * nearest[path] for path in awq), (awq, nearest)


def test_what_awq_folds_leaves_the_function_as_it_was():
  """With nothing to quantize but one layer, all the others stay floats: scaled, and the same function."""
  model, want = decoder(), logits(decoder(), TEXT[0])
  kernel = np.asarray(model.layers[0].attention.v_proj.kernel[...])
  quantize_calibrated(
    model,
    TEXT,
    Awq(),
    QuantSpec(bits=8, group_size=16),
    predicate=lambda path, layer: path[-1] in ("o_proj", "down_proj"),
  )
  assert isinstance(model.layers[0].attention.o_proj, QuantLinear)
  changed = np.asarray(model.layers[0].attention.v_proj.kernel[...])
  assert not np.allclose(changed, kernel)  # something was folded
  np.testing.assert_allclose(logits(model, TEXT[0]), want, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("method", [Gptq(), Awq()], ids=["gptq", "awq"])
def test_the_head_is_calibrated_too_where_it_is_asked_for(method):
  model = decoder()
  want, norm = logits(model, TEXT[0]), np.asarray(model.norm.scale[...])
  report = quantize_calibrated(model, TEXT, method, SPEC, predicate=lambda path, layer: path == ("lm_head",))
  (head,) = report.quantized
  assert head.path == ("lm_head",) and head.output_error < 0.02 and isinstance(model.lm_head, QuantLinear)
  assert len(report.skipped) == 14
  assert np.allclose(model.norm.scale[...], norm) == isinstance(method, Gptq)  # AWQ's factors are folded into it
  assert ((logits(model, TEXT[0]) - want) ** 2).sum() < 0.02 * (want**2).sum()


def test_a_fused_model_is_taken_apart_first():
  model = fuse(decoder())
  assert len(quantize_calibrated(model, TEXT[:2], Gptq(), SPEC).quantized) == 14


def test_a_tied_model_has_no_head():
  model = decoder(tie_word_embeddings=True)
  assert len(quantize_calibrated(model, TEXT[:2], Awq(), SPEC).layers) == 14


def test_damping_that_was_raised_is_in_the_report():
  model = decoder()
  chosen = dict(predicate=lambda path, layer: path[-1] in ("q_proj", "down_proj"))
  report = quantize_calibrated(model, [[5] * 64], Gptq(damping=0.0), SPEC, **chosen)  # one token: Hessians of rank one
  notes = {layer.note for layer in report.quantized}
  assert notes and all(note.startswith("damping raised from 0 to 0.") for note in notes)
  assert "layers.0.attention.q_proj: damping raised from 0 to 0." in str(report)


@pytest.mark.parametrize(
  "text, message",
  [
    ([], "sequences is empty"),
    ([[1, 2], []], r"sequences\[1\] has 0 tokens, must have 1 .. 64"),
    ([[1] * 65], r"sequences\[0\] has 65 tokens"),
    ([[1, 97]], r"sequences\[0\] has the token id 97, which must be an integer in 0 .. 96"),
  ],
)
def test_sequences_that_the_model_cannot_read_are_refused(text, message):
  with pytest.raises(ValueError, match=message):
    quantize_calibrated(decoder(), text, Gptq(), SPEC)


def test_layers_that_cannot_be_quantized_are_named():
  with pytest.raises(ValueError, match=r"layer layers.0.attention.k_proj: group_size=128 does not divide k=64"):
    quantize_calibrated(decoder(), TEXT[:1], Gptq(), QuantSpec())
  model = decoder()
  model.layers[1].mlp.up_proj.kernel[...] = model.layers[1].mlp.up_proj.kernel[...].at[0, 0].set(jnp.nan)
  with pytest.raises(ValueError, match=r"layer layers.1.mlp.up_proj: the kernel holds NaN or Inf"):
    quantize_calibrated(model, TEXT[:1], Awq(), SPEC)


def test_a_model_that_is_quantized_already_is_refused():
  model = decoder()
  convert(model, SPEC)
  with pytest.raises(ValueError, match="quantized layers already"):
    quantize_calibrated(model, TEXT, Gptq(), SPEC)


def test_settings_are_checked():
  with pytest.raises(ValueError, match=r"damping=2.0 must be in 0 .. 1"):
    Gptq(damping=2.0)


def test_inputs_that_are_not_finite_are_an_error():
  model = decoder()
  model.embed.embedding[...] = model.embed.embedding[...].at[5, 0].set(jnp.inf)
  with pytest.raises(ValueError, match=r"layer layers\.0: what attention\.\w_proj reads .* is not finite"):
    quantize_calibrated(model, [[5] * 64], Awq(), SPEC)


TWO_DEVICES = """
import os
import subprocess
import sys
from pathlib import Path

import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp
from flax import nnx
from marlin_jax import Awq, Gptq, QuantSpec, generate
from marlin_jax.calibration import quantize_calibrated
from marlin_jax.models import Decoder, ModelConfig
here, elsewhere = jax.devices()
config = ModelConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2,
                     head_dim=16, max_position_embeddings=64)
for method in (Gptq(), Awq()):
  model = Decoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(1))
  nnx.update(model, jax.device_put(nnx.state(model), elsewhere))
  quantize_calibrated(model, [list(range(16))], method, QuantSpec(group_size=16), device=here)
  assert {leaf.device for leaf in jax.tree.leaves(nnx.state(model))} == {here}
  assert len(generate(model, [[1, 2, 3]], max_new_tokens=2)[0]) == 2
"""


def test_a_model_in_host_memory_ends_up_on_the_device_that_calibrates():
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in the process of the tests
    "PYTHONPATH": str(Path(__file__).parents[3]),
  }
  subprocess.run([sys.executable, "-c", TWO_DEVICES], env=environment, check=True, timeout=300)
