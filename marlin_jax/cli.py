# SPDX-License-Identifier: Apache-2.0
"""The command line: reads arguments, calls the package, prints errors as one sentence."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from marlin_jax.arguments import add_calibration, calibration, group_size
from marlin_jax.bench.cli import add_commands
from marlin_jax.calibration import Gptq
from marlin_jax.checkpoint import load_model
from marlin_jax.checkpoint.folder import find_folder
from marlin_jax.checkpoint.huggingface import read_config
from marlin_jax.console import describe_checkpoint, describe_matmuls, write_continuation
from marlin_jax.convert import keep_head_and_routers, keep_routers
from marlin_jax.demo.run import run_demo
from marlin_jax.generation.sampling import Sampling
from marlin_jax.quantization import CALIBRATED, QUANTIZERS, quantize_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status: 0, or 2 for bad input."""
  arguments = _parser().parse_args(argv)
  try:
    arguments.run(arguments)
  except (ValueError, NotImplementedError, FileNotFoundError) as error:
    print(f"marlin-jax: {error}", file=sys.stderr)
    return 2
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="marlin-jax", description="4-bit inference for JAX.")
  commands = parser.add_subparsers(required=True, metavar="COMMAND")

  quantize = commands.add_parser("quantize", help="write a quantized copy of a float checkpoint")
  quantize.add_argument("source", help="Hugging Face checkpoint folder, or a Hub model in the local cache")
  quantize.add_argument("destination", type=Path, help="folder to write; must not exist yet")
  quantize.add_argument("--bits", type=int, default=4)
  quantize.add_argument("--group-size", type=group_size, default=128, help="16, 32, 64, 128 (default), ... or column")
  symmetry = quantize.add_mutually_exclusive_group()
  symmetry.add_argument("--symmetric", dest="symmetric", action="store_true", default=None, help="no zero points")
  symmetry.add_argument("--asymmetric", dest="symmetric", action="store_false", help="a zero point for every group")
  quantize.add_argument("--sparse24", action="store_true", help="keep two of every four weights; rtn, wanda, gptq")
  quantize.add_argument("--quantize-head", action="store_true", help="the output head, too; the default leaves it")
  quantize.add_argument(
    "--method",
    choices=(*QUANTIZERS, *CALIBRATED),
    default="rtn",
    help="rtn (default) and hqq need no data; gptq, awq and wanda, which is for --sparse24, read text",
  )
  quantize.add_argument("--act-order", action="store_true", help="gptq: groups of features with similar inputs")
  quantize.add_argument(
    "--damping", type=float, default=Gptq().damping, help="gptq: of the Hessian (default %(default)s)"
  )
  add_calibration(quantize, length=2048)
  quantize.add_argument(
    "--format",
    choices=("native", "compressed-tensors"),
    default="native",
    help="native (default): loads at once, here; compressed-tensors: other tools read it too",
  )
  quantize.set_defaults(run=_quantize)

  generate = commands.add_parser("generate", help="continue a prompt")
  generate.add_argument("model", help="checkpoint folder, float or quantized")
  generate.add_argument("--prompt", required=True)
  generate.add_argument("--max-new-tokens", type=int, default=64)
  generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
  generate.add_argument("--top-k", type=int)
  generate.add_argument("--top-p", type=float, default=1.0)
  generate.add_argument("--repetition-penalty", type=float, default=1.0)
  generate.add_argument("--seed", type=int, default=0)
  generate.set_defaults(run=_generate)

  serve = commands.add_parser("serve", help="answer many clients over the OpenAI API")
  serve.add_argument("model", help="checkpoint folder, float or quantized")
  serve.add_argument("--host", default="127.0.0.1", help="127.0.0.1 (default) is reached from this machine only")
  serve.add_argument("--port", type=int, default=8000, help="8000 (default); 0 picks a free one")
  serve.add_argument("--api-key", help="what clients must send (default: MARLIN_JAX_API_KEY, if it is set)")
  serve.add_argument("--slots", type=int, default=16, help="requests decoded at the same time (default: 16)")
  serve.add_argument("--context", type=int, default=2048, help="tokens of prompt and answer together (default: 2048)")
  serve.add_argument("--queue-limit", type=int, default=64, help="requests that may wait for a slot (default: 64)")
  serve.set_defaults(run=_serve)

  inspect = commands.add_parser("inspect", help="say what a checkpoint holds, without reading its weights")
  inspect.add_argument("model", help="checkpoint folder")
  inspect.set_defaults(run=lambda arguments: print(describe_checkpoint(arguments.model)))

  demo = commands.add_parser("demo", help="quantize the model that ships, and let it write")
  demo.set_defaults(run=lambda arguments: run_demo())

  add_commands(commands)
  return parser


def _quantize(arguments: argparse.Namespace) -> None:
  method: str | Gptq = arguments.method
  if method == "gptq":
    method = Gptq(damping=arguments.damping, act_order=arguments.act_order)
  if arguments.quantize_head and read_config(find_folder(arguments.source))[1].tie_word_embeddings:
    raise ValueError(f"--quantize-head: the head of {arguments.source} is its embedding table, which stays as it is")
  quantize_checkpoint(
    arguments.source,
    arguments.destination,
    bits=arguments.bits,
    group_size=arguments.group_size,
    symmetric=arguments.symmetric,
    sparse24=arguments.sparse24,
    method=method,
    calibration=calibration(arguments) if arguments.method in CALIBRATED else None,
    calibration_count=arguments.calibration_count,
    calibration_length=arguments.calibration_length,
    predicate=keep_routers if arguments.quantize_head else keep_head_and_routers,
    format=arguments.format,
  )
  print(describe_checkpoint(arguments.destination))


def _generate(arguments: argparse.Namespace) -> None:
  sampling = Sampling(
    temperature=arguments.temperature,
    top_k=arguments.top_k,
    top_p=arguments.top_p,
    repetition_penalty=arguments.repetition_penalty,
    seed=arguments.seed,
  )
  model = load_model(arguments.model)
  print(describe_matmuls(model), file=sys.stderr)

  def write(text: str) -> None:
    print(text, end="", flush=True)

  line = write_continuation(model, arguments.prompt, write, max_new_tokens=arguments.max_new_tokens, sampling=sampling)
  print()
  print(line, file=sys.stderr)


def _serve(arguments: argparse.Namespace) -> None:
  try:
    from marlin_jax.serving.server import ServingConfig, serve
  except ModuleNotFoundError as error:
    raise ValueError(f"serve needs {error.name}: pip install 'marlin_jax[serve]' brings all it needs") from None
  config = ServingConfig(slots=arguments.slots, context=arguments.context, queue_limit=arguments.queue_limit)
  key = arguments.api_key or os.environ.get("MARLIN_JAX_API_KEY")
  status = serve(arguments.model, host=arguments.host, port=arguments.port, api_key=key or None, config=config)
  if status:
    sys.exit(status)


if __name__ == "__main__":
  sys.exit(main())
