# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax tune` and `marlin-jax bench`: their arguments, and what is called with them."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from marlin_jax.arguments import add_calibration, calibration, group_size
from marlin_jax.bench.layers import NAMED_SHAPES, parse_shapes, shapes_of_model
from marlin_jax.bench.layers import SHAPES as LAYERS
from marlin_jax.bench.matmul import BATCHES, bench_matmul
from marlin_jax.bench.model import BATCHES as MODEL_BATCHES
from marlin_jax.bench.model import bench_model
from marlin_jax.bench.plot import FIGURES, plot
from marlin_jax.bench.quality import GROUP_SIZES, METHODS, SPARSE_METHODS, bench_quality
from marlin_jax.bench.shapes import SHAPES as MODELS
from marlin_jax.bench.shapes import read_shape
from marlin_jax.bench.tune import tune
from marlin_jax.calibration.text import read_texts
from marlin_jax.demo import heldout_text, model_path
from marlin_jax.quantized import QuantSpec
from pallas_kernels import MatmulProblem
from pallas_kernels.tuning import CONFIGS


def add_commands(commands: Any) -> None:
  """Adds both commands to those of the program."""
  tune = commands.add_parser("tune", help="find the fastest kernel configs on the GPU at hand")
  _add_shapes(tune)
  tune.add_argument("--batches", type=int, nargs="+", default=(1, 8, 16, 32, 64, 128), metavar="M")
  tune.add_argument("--group-size", type=group_size, default=128, help="16, 32, 64, 128 (default), ... or column")
  tune.add_argument("--bits", type=int, choices=(4, 8), default=4)
  tune.add_argument("--zeros", action="store_true", help="weights with zero points")
  tune.add_argument("--sparse24", action="store_true", help="2:4 sparse weights")
  tune.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
  tune.add_argument("--implementations", choices=tuple(CONFIGS), nargs="+", default=tuple(CONFIGS))
  tune.add_argument("--candidates", type=int, metavar="COUNT", help="at most, for a problem (default: all)")
  tune.add_argument("--seconds", type=float, help="what it may take (default: no limit)")
  tune.add_argument("--output", type=Path, required=True, help="table to write, for MARLIN_JAX_TUNED; rows are added")
  tune.set_defaults(run=_tune)

  bench = commands.add_parser("bench", help="measure on the GPU at hand").add_subparsers(required=True, metavar="WHAT")
  matmul = bench.add_parser("matmul", help="the 4-bit matmul against bfloat16")
  _add_shapes(matmul)
  matmul.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="M")
  matmul.add_argument("--sparse24", action="store_true", help="the kernels of 2:4 sparse weights, too")
  matmul.add_argument("--output", type=Path, help="CSV file to write")
  matmul.add_argument("--tuned", type=Path, help="table of `marlin-jax tune` to use before the shipped one")
  matmul.add_argument("--implementations", nargs="+", metavar="NAME", help="of the table, hopper say (default: all)")
  matmul.set_defaults(run=_bench_matmul)
  model = bench.add_parser("model", help="a whole model's prefill and decode, bfloat16 against 4 bits")
  model.add_argument("model", help=f"config.json, or one of {', '.join(MODELS)}; the weights are random")
  model.add_argument("--weights", choices=("bf16", "4-bit"), nargs="+", default=("bf16", "4-bit"))
  model.add_argument("--sparse24", action="store_true", help="4 bits with 2:4 sparsity, too")
  model.add_argument("--group-size", type=group_size, default=128, help="16, 32, 64, 128 (default), ... or column")
  model.add_argument("--quantize-head", action="store_true", help="then again, with the output head in 4 bits")
  model.add_argument("--batches", type=int, nargs="+", default=MODEL_BATCHES, metavar="B")
  model.add_argument("--prompt-tokens", type=int, default=64)
  model.add_argument("--new-tokens", type=int, default=64)
  model.add_argument("--profile", action="store_true", help="print where a decode step's time goes, by kernel")
  model.add_argument("--output", type=Path, help="CSV file to write")
  model.set_defaults(run=_bench_model)
  serving = bench.add_parser("serve", help="what clients of the server wait for, bfloat16 against 4 bits")
  serving.add_argument("model", help=f"config.json, or one of {', '.join(MODELS)}; the weights are random")
  serving.add_argument("--weights", choices=("bf16", "4-bit"), nargs="+", default=("bf16", "4-bit"))
  serving.add_argument("--group-size", type=group_size, default=128, help="16, 32, 64, 128 (default), ... or column")
  serving.add_argument(
    "--rates", type=float, nargs="*", default=(1.0, 2.5, 5.0, 10.0), help="requests a second (default: 1 2.5 5 10)"
  )
  serving.add_argument("--seconds", type=int, default=60, help="of each rate (default %(default)s)")
  serving.add_argument(
    "--overload", type=int, default=0, metavar="SECONDS", help="then, of twice the rate that fills all slots"
  )
  serving.add_argument("--prompt-tokens", type=int, default=64)
  serving.add_argument("--new-tokens", type=int, default=64)
  serving.add_argument("--slots", type=int, default=16, help="requests decoded at the same time (default: 16)")
  serving.add_argument("--context", type=int, default=2048, help="tokens of prompt and answer together (default: 2048)")
  serving.add_argument("--output", type=Path, help="CSV file to write")
  serving.set_defaults(run=_bench_serve)
  quality = bench.add_parser("quality", help="perplexity by method of quantization; a CPU is enough")
  quality.add_argument("model", nargs="?", help="float checkpoint folder (default: the demo model)")
  quality.add_argument("--heldout", type=Path, metavar="FILE", help="text to score (default: the demo model's)")
  quality.add_argument("--methods", choices=(*METHODS, *SPARSE_METHODS), nargs="+", default=METHODS)
  quality.add_argument("--bits", type=int, choices=(4, 8, 16), nargs="+", default=(4, 8), help="16: sparse24-... only")
  quality.add_argument("--group-sizes", type=group_size, nargs="+", default=GROUP_SIZES, metavar="SIZE")
  quality.add_argument("--windows", type=int, default=32, help="of the model's context to score (default %(default)s)")
  add_calibration(quality, length=512)
  quality.add_argument("--output", type=Path, help="CSV file to write")
  quality.set_defaults(run=_bench_quality)
  drawing = bench.add_parser("plot", help="draw the table of `bench matmul`, `bench quality` or `bench serve`")
  drawing.add_argument("table", type=Path)
  drawing.add_argument("image", type=Path)
  drawing.add_argument("--kind", choices=tuple(FIGURES), default="speedup")
  drawing.set_defaults(run=lambda arguments: plot(arguments.table, arguments.image, arguments.kind))


def _add_shapes(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--shapes", nargs="+", metavar="KxN", help=f"or {', '.join(NAMED_SHAPES)}")
  parser.add_argument("--model", help=f"all layers of a config.json, or of one of {', '.join(MODELS)}")


def _shapes(arguments: argparse.Namespace) -> list[tuple[int, int]]:
  shapes = [shape for text in arguments.shapes or () for shape in parse_shapes(text)]
  shapes += () if arguments.model is None else shapes_of_model(read_shape(arguments.model))
  return list(dict.fromkeys(shapes)) or list(LAYERS)


def _bench_matmul(arguments: argparse.Namespace) -> None:
  options = dict(sparse24=arguments.sparse24, implementations=arguments.implementations)
  bench_matmul(_shapes(arguments), arguments.batches, arguments.output, arguments.tuned, **options)


def _tune(arguments: argparse.Namespace) -> None:
  problems = [
    MatmulProblem(
      m=m,
      n=n,
      k=k,
      group_size=arguments.group_size or k,
      dtype=jnp.dtype(arguments.dtype),
      bits=arguments.bits,
      zeros=arguments.zeros,
      sparse24=arguments.sparse24,
    )
    for k, n in _shapes(arguments)
    for m in arguments.batches
  ]
  tune(
    problems,
    arguments.output,
    implementations=arguments.implementations,
    most=arguments.candidates,
    seconds=arguments.seconds,
  )


def _model_name(model: str) -> str:
  return model if model in MODELS else Path(model).stem  # "qwen2.5-32b" has no suffix


def _bench_model(arguments: argparse.Namespace) -> None:
  quantized = QuantSpec(group_size=arguments.group_size)
  specs = [quantized if weights == "4-bit" else None for weights in arguments.weights]
  if arguments.sparse24:
    specs.append(dataclasses.replace(quantized, sparse24=True))
  bench_model(
    _model_name(arguments.model),
    read_shape(arguments.model),
    specs,
    arguments.batches,
    prompt_tokens=arguments.prompt_tokens,
    new_tokens=arguments.new_tokens,
    quantize_head=arguments.quantize_head,
    profiled=arguments.profile,
    output=arguments.output,
  )


def _bench_serve(arguments: argparse.Namespace) -> None:
  try:
    from marlin_jax.bench.serve import ServingConfig, bench_serve
  except ModuleNotFoundError as error:
    raise ValueError(f"it needs {error.name}: pip install 'marlin_jax[load]' brings all it needs") from None
  quantized = QuantSpec(group_size=arguments.group_size)
  bench_serve(
    _model_name(arguments.model),
    read_shape(arguments.model),
    [quantized if weights == "4-bit" else None for weights in arguments.weights],
    arguments.rates,
    seconds=arguments.seconds,
    overload=arguments.overload,
    prompt_tokens=arguments.prompt_tokens,
    new_tokens=arguments.new_tokens,
    serving=ServingConfig(slots=arguments.slots, context=arguments.context),
    output=arguments.output,
  )


def _bench_quality(arguments: argparse.Namespace) -> None:
  bench_quality(
    arguments.model or model_path(),
    heldout_text() if arguments.heldout is None else read_texts([arguments.heldout])[0],
    calibration(arguments),
    methods=arguments.methods,
    bits=arguments.bits,
    group_sizes=arguments.group_sizes,
    windows=arguments.windows,
    calibration_count=arguments.calibration_count,
    calibration_length=arguments.calibration_length,
    output=arguments.output,
  )
