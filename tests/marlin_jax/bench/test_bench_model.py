# SPDX-License-Identifier: Apache-2.0
import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from marlin_jax import QuantLinear
from marlin_jax.bench.model import bench_model, step_floor
from marlin_jax.bench.profile import kernel_class, summarize
from marlin_jax.bench.shapes import SHAPES, abstract_model, nbytes, random_model, read_shape
from marlin_jax.models import config_to_hf
from marlin_jax.quantized import QuantSpec
from tests.marlin_jax.bench.small_model import SMALL
from tests.marlin_jax.small_moe import SMALL_MOE


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured(tmp_path):
  with pytest.raises(NotImplementedError, match="nothing measured"):
    bench_model("small", SMALL, [None], [1], prompt_tokens=4, new_tokens=4, output=tmp_path / "table.csv")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("name", "parameters"), [("llama-3-8b", 8.03e9), ("qwen2.5-32b", 32.8e9), ("llama-3-70b", 70.6e9)]
)
def test_the_shapes_have_the_sizes_they_are_named_after(name, parameters):
  # All layers are alike, so that two of up to 80 tell the size.
  one, two = (
    nbytes(abstract_model(dataclasses.replace(SHAPES[name], num_layers=n, sliding_windows=()), None)) for n in (1, 2)
  )
  assert one + (SHAPES[name].num_layers - 1) * (two - one) == pytest.approx(2 * parameters, rel=2e-3)


def test_a_mixture_of_experts_is_refused():
  with pytest.raises(NotImplementedError, match="bench is not implemented for models with experts"):
    random_model(SMALL_MOE, None)


def test_a_shape_is_read_from_a_config(tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps(config_to_hf(SMALL)))
  assert read_shape(str(path)) == read_shape(str(tmp_path)) == SMALL
  with pytest.raises(ValueError, match="neither a config"):
    read_shape("no-such-model")


@pytest.mark.parametrize("spec", [None, QuantSpec(group_size=64)])
def test_a_random_model_computes(spec):
  model = random_model(SMALL, spec, quantize_head=spec is not None)
  quantized = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, QuantLinear)]
  assert bool(quantized) == (spec is not None) == isinstance(model.lm_head, QuantLinear)
  logits = nnx.jit(lambda model: model(jnp.arange(8)[None]))(model)
  assert jnp.isfinite(logits).all() and logits.std() > 1e-3
  assert nbytes(model) == nbytes(abstract_model(SMALL, spec, quantize_head=spec is not None))


def test_the_floor_is_the_bytes_of_a_step_or_its_arithmetic():
  model = abstract_model(SMALL, None)
  weights = nbytes(model) - 128 * 128 * 2
  cache = 2 * 10 * 1 * 64 * 2 * SMALL.num_layers  # keys and values, positions, heads, head_dim, bytes
  assert step_floor(model, 3, 10, 1e9, 1e30) == pytest.approx((weights + 3 * (cache + 128 * 2)) / 1e9)
  dense = SMALL.num_layers * (128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 128) + 128 * 128
  assert step_floor(model, 3, 10, 1e30, 1e9) == pytest.approx(2 * 3 * dense / 1e9)


def test_kernels_are_summed_by_kind():
  names = ["loop_add_fusion_12", "loop_add_fusion", "w4a16_hopper", "void cutlass::Kernel<int>(Params)"]
  assert [kernel_class(name) for name in names] == ["loop_add_fusion"] * 2 + ["w4a16_hopper", "cutlass::Kernel"]
  result = summarize([(name, 0.5) for name in names], wall=4e-3, steps=2)
  assert result.kernels[0] == ("loop_add_fusion", 0.5e-3, 1)
  assert result.busy == pytest.approx(1e-3) and result.wall == pytest.approx(2e-3)
  assert "1000.0           50.0%  (no kernel running)" in str(result)


@pytest.mark.gpu
def test_a_row_is_measured_and_written(tmp_path, capsys):
  bench_model(
    "small",
    SMALL,
    [None, QuantSpec()],
    [1, 16],
    prompt_tokens=16,
    new_tokens=16,
    profiled=True,
    output=tmp_path / "results" / "table.csv",
  )
  rows = list(csv.DictReader((tmp_path / "results" / "table.csv").read_text().splitlines()))
  assert [(row["weights"], row["batch"]) for row in rows] == [(w, b) for w in ("bf16", "4-bit") for b in ("1", "16")]
  assert all(float(row["step_over_floor"]) > 1 for row in rows)
  assert "w4a16" in capsys.readouterr().out
