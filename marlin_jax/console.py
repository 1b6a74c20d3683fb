# SPDX-License-Identifier: Apache-2.0
"""What the command line prints about a model: what it is, what multiplies its weights, and text as it comes."""

import math
import os
import time
from collections.abc import Callable

import numpy as np
from flax import nnx

from marlin_jax.checkpoint.folder import find_folder
from marlin_jax.checkpoint.huggingface import read_config
from marlin_jax.checkpoint.quantized_layers import quantized_layers
from marlin_jax.checkpoint.safetensors_files import Checkpoint
from marlin_jax.checkpoint.sparse24_bitmask import decompressed
from marlin_jax.generation.loop import generate_tokens
from marlin_jax.generation.sampling import GREEDY, Sampling
from marlin_jax.models.decoder import Decoder
from marlin_jax.nnx import QuantLinear
from pallas_kernels import MatmulProblem, choose_implementation, current_device

_CHUNK = 8  # tokens between two prints


def describe_matmuls(model: nnx.Module) -> str:
  """One line: which implementation multiplies the quantized weights of `model` here, at batch size 1."""
  device = current_device()
  layers = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, QuantLinear)]
  if not layers:
    return f"no quantized layers: XLA's own matmul on {device.kind}"
  chosen, count = set(), 0
  for layer in layers:
    w = layer.packed
    count += math.prod(w.stack)  # of experts each is one
    k, n = w.shape
    sizes = dict(m=1, n=n, k=k, group_size=w.group_size)
    kind = dict(bits=w.bits, zeros=w.zeros is not None, sparse24=w.meta is not None)
    problem = MatmulProblem(**sizes, dtype=np.dtype(layer.dtype), **kind)
    chosen.add(choose_implementation(problem, device))
  names = ", ".join(sorted(chosen))
  if chosen == {"reference"}:
    return f"{count} quantized layers: plain JAX ({names}) on {device.kind}; the kernels need an NVIDIA GPU"
  return f"{count} quantized layers: Pallas kernel {names} on {device.kind}"


def describe_checkpoint(path: str | os.PathLike[str]) -> str:
  """A few lines on a checkpoint folder, from its config and the headers of its files; no weights are read.

  Raises:
    CheckpointError, NotImplementedError: as for `load_model`.
  """
  folder = find_folder(path)
  hf, config = read_config(folder)
  hf, checkpoint = decompressed(hf, Checkpoint(folder))
  quantized = quantized_layers(hf, checkpoint)
  packed = [name for name in checkpoint if name.rpartition(".")[0] in quantized]
  sizes = {name: checkpoint.nbytes(name) for name in checkpoint}
  packed_bytes = sum(sizes[name] for name in packed)
  lines = [
    f"{config.architecture}: {config.num_layers} layers, hidden size {config.hidden_size}, "
    f"vocabulary {config.vocab_size}, context {config.max_position_embeddings}"
    + (f", {config.moe.num_experts_per_tok} of {config.moe.num_experts} experts a token" if config.moe else ""),
    f"{len(sizes)} tensors, {sum(sizes.values()) / 1e6:.1f} MB",
  ]
  if quantized:
    specs = sorted(
      {
        f"{s.bits} bits, {f'groups of {s.group_size}' if s.group_size else 'one scale a column'}"
        + (", 2:4 sparse" if s.sparse24 else "")
        for s in quantized.values()
      }
    )
    lines.append(f"{len(quantized)} quantized layers, {packed_bytes / 1e6:.1f} MB: {'; '.join(specs)}")
  else:
    lines.append("no quantized layers")
  lines.append("tokenizer: " + ("tokenizer.json" if (folder / "tokenizer.json").is_file() else "none"))
  return "\n".join(lines)


def write_continuation(
  model: Decoder,
  prompt: str,
  write: Callable[[str], object],
  *,
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
) -> str:
  """Writes the continuation of `prompt` as it is generated; returns a line that says how fast it came.

  The rate leaves out prefill and the first chunk of tokens, which compile.

  Raises:
    ValueError: as for `marlin_jax.generate`.
  """
  if model.tokenizer is None:
    raise ValueError("the model has no tokenizer, so it cannot take a text prompt")
  if not prompt:
    raise ValueError("prompt is empty: it must hold at least one character")
  tokens, eos = model.tokenizer.encode(prompt), model.config.eos_token_ids
  decoder = model.tokenizer.stream()
  decoder.add(tokens)
  began, counts, times = time.perf_counter(), [], []
  for (chunk,) in generate_tokens(
    model, [tokens], max_new_tokens=max_new_tokens, sampling=sampling, eos_token_ids=eos, chunk=_CHUNK
  ):
    counts.append(len(chunk))
    times.append(time.perf_counter() - began)
    write(decoder.add([token for token in chunk if token not in eos]))
  write(decoder.finish())
  line = f"{sum(counts)} tokens, the first after {times[0]:.2f} s"
  if len(counts) > 2:
    line += f", then {sum(counts[2:]) / (times[-1] - times[1]):.1f} tokens/s"
  return line
