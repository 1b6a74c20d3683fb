# SPDX-License-Identifier: Apache-2.0
"""Trains the demo model: a 21 M-parameter Llama on the Python standard library's own sources.

    python examples/04_train_demo.py --output model                     # minutes on one H200
    python examples/04_train_demo.py --prepare corpus.npz               # the text only: split, tokenizer, token ids
    python examples/04_train_demo.py --source corpus.npz --output model # the training only
    python examples/04_train_demo.py --tiny --output model              # seconds on a CPU, to see every step work

Files are concatenated with an end-of-text token between them, and training windows are cut from that stream anywhere,
so a prompt is plain Python source, from the middle of a file or from its start. The output is a Hugging Face checkpoint
folder, which `marlin_jax.load_model` reads like any other.
"""

import argparse
import dataclasses
import math
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from marlin_jax.checkpoint import load_model
from marlin_jax.checkpoint.folder import new_folder, write_json
from marlin_jax.checkpoint.huggingface import tensor_name
from marlin_jax.checkpoint.safetensors_files import ShardWriter
from marlin_jax.demo.corpus import END_OF_TEXT, Corpus, build_corpus
from marlin_jax.generation.scoring import perplexity
from marlin_jax.models.config import ModelConfig
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.huggingface_config import config_to_hf
from marlin_jax.text import generate

SHARD_BYTES = 8 * 2**20  # small enough for any file store that git talks to
PROMPTS = ("def main(argv=None):\n", "class TestQueue(unittest.TestCase):\n", "import os\nimport sys\n\n")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
  """Sizes and settings of one run. A step is `batch_size` windows of the model's context, `micro_batch` at a time."""

  model: ModelConfig
  sample_bytes: int = 256 * 1024
  held_out: float = 0.03  # share of the text
  batch_size: int = 128
  micro_batch: int = 32  # attention scores are micro_batch x heads x context x context float32 numbers a layer
  steps: int = 600
  score_every: int = 50  # steps
  learning_rate: float = 2e-3
  warm_up: float = 0.05  # share of the run
  weight_decay: float = 0.1


# Every width is a multiple of 128, so that every dense layer fits groups of 128 without padding.
FULL = Recipe(
  model=ModelConfig(
    vocab_size=6144,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(0,),
  )
)
TINY = Recipe(
  model=dataclasses.replace(
    FULL.model,
    vocab_size=512,
    hidden_size=128,
    intermediate_size=128,
    num_layers=2,
    sliding_windows=(),
    num_heads=2,
    num_kv_heads=2,
    max_position_embeddings=64,
  ),
  sample_bytes=64 * 1024,
  held_out=0.2,
  batch_size=8,
  micro_batch=4,
  steps=20,
  score_every=10,
)


def window_starts(length: int, recipe: Recipe, seed: int) -> Iterator[np.ndarray]:
  """Endless batches of window positions: each epoch cuts the stream at another phase and shuffles the windows."""
  rng, context = np.random.default_rng(seed), recipe.model.max_position_embeddings
  pending = np.empty(0, np.int32)
  while True:
    while len(pending) < recipe.batch_size:
      starts = np.arange(rng.integers(context), length - context, context, dtype=np.int32)
      pending = np.concatenate([pending, rng.permutation(starts)])
    yield pending[: recipe.batch_size].reshape(-1, recipe.micro_batch)
    pending = pending[recipe.batch_size :]


def learning_rate(progress: float, recipe: Recipe) -> float:
  """Linear warm-up, then a cosine to zero, over a progress of 0 to 1."""
  if progress < recipe.warm_up:
    return recipe.learning_rate * progress / recipe.warm_up
  return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - recipe.warm_up) / (1 - recipe.warm_up)))


def initialize(params: nnx.State, recipe: Recipe, seed: int) -> nnx.State:
  """GPT-2's initial weights: normal(0.02), smaller by sqrt(2 layers) where a block adds to the residual stream."""
  keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))

  def draw(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
    key, name = next(keys), jax.tree_util.keystr(path)
    if value.ndim == 1:  # norms start at one
      return value
    into_residual = "o_proj" in name or "down_proj" in name
    return jax.random.normal(key, value.shape) * 0.02 / (math.sqrt(2 * recipe.model.num_layers) if into_residual else 1)

  return jax.tree_util.tree_map_with_path(draw, params)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
  """AdamW with gradient clipping, without its learning rate: the time limit decides that step by step."""
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b1=0.9, b2=0.95),
    optax.add_decayed_weights(recipe.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
  )


def make_train_step(graphdef: Any, optimizer: optax.GradientTransformation, context: int) -> Any:
  """One optimizer step over [micro steps, micro batch] windows of the token stream, which stays on the device."""

  def mean_loss(params: nnx.State, windows: jax.Array) -> jax.Array:
    logits = nnx.merge(graphdef, params)(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

  @partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params: nnx.State, moments: Any, tokens: jax.Array, starts: np.ndarray, rate: float) -> Any:
    def micro_step(total: Any, rows: jax.Array) -> tuple[Any, None]:
      windows = tokens[rows[:, None] + jnp.arange(context + 1)].astype(jnp.int32)
      return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(params, windows)), None

    nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(micro_step, nothing, starts)
    loss, gradients = jax.tree.map(lambda value: value / starts.shape[0], total)
    updates, moments = optimizer.update(gradients, moments, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), moments, loss

  return train_step


def train(corpus: Corpus, recipe: Recipe, *, minutes: float, seed: int) -> tuple[Decoder, dict[str, Any]]:
  """Trains until the steps or the minutes are used up; returns the best model by validation score, and facts."""
  context = recipe.model.max_position_embeddings
  model = Decoder(recipe.model, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))
  # Gathers float32 rows: the gradient of a frequent token is a sum of thousands of terms, too many for bf16. The
  # residual stream becomes float32 with it; the layers go on computing in bf16.
  model.embed.dtype = jnp.float32
  graphdef, params = nnx.split(model)
  params = initialize(params, recipe, seed)
  optimizer = make_optimizer(recipe)
  moments = optimizer.init(params)
  train_step = make_train_step(graphdef, optimizer, context)
  tokens, starts = jnp.asarray(corpus.training), window_starts(len(corpus.training), recipe, seed)
  step_tokens = recipe.batch_size * context
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(f"{size / 1e6:.2f} M parameters, {len(tokens) / 1e6:.2f} M training tokens, {step_tokens} tokens a step")

  best, best_params, best_step = math.inf, params, 0
  losses: list[float] = []
  progress, began, scoring = 0.0, time.perf_counter(), 0.0
  while progress < 1:
    params, moments, loss = train_step(params, moments, tokens, next(starts), learning_rate(progress, recipe))
    losses.append(float(loss))
    step = len(losses)
    if step == 1:  # compiling is over, and the clock that the schedule follows starts
      print(f"compiled in {time.perf_counter() - began:.1f} s")
      began = time.perf_counter()
    seconds = time.perf_counter() - began
    progress = max(step / recipe.steps, seconds / (60 * minutes))
    if step % recipe.score_every and progress < 1:
      continue
    rate = (step - 1) * step_tokens / max(seconds - scoring, 1e-9)
    score = perplexity(nnx.merge(graphdef, params), corpus.validation.astype(np.int32), window=context)
    scoring += time.perf_counter() - began - seconds
    if score < best:
      # A copy: the next step overwrites the arrays it is given.
      best, best_params, best_step = score, jax.tree.map(jnp.copy, params), step
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(
      f"step {step:4d}  loss {np.mean(losses[-recipe.score_every :]):.3f}  validation perplexity {score:.2f}  "
      f"epoch {step * step_tokens / len(tokens):.1f}  {rate / 1e3:.0f} k tokens/s  "
      f"{seconds:.0f} s, {max(0, seconds / progress - seconds):.0f} s left  peak memory {memory / 2**30:.1f} GiB",
      flush=True,
    )
  facts = {
    "parameters": size,
    "steps": len(losses),
    "best_step": best_step,
    "tokens_per_step": step_tokens,
    "training_tokens": len(tokens),
    "seconds": round(seconds, 1),
    "device": jax.devices()[0].device_kind,
    "seed": seed,
    "learning_rate": recipe.learning_rate,
    "weight_decay": recipe.weight_decay,
    "losses": [round(loss, 3) for loss in losses],
    "validation_perplexity": round(best, 3),
  }
  return nnx.merge(graphdef, best_params), facts


def write_checkpoint(model: Decoder, corpus: Corpus, facts: dict[str, Any], output: Path) -> None:
  """Writes the Hugging Face folder, with the held-out sample and the facts of the run beside the weights."""
  tokenizer_config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": False,
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
    "model_max_length": model.config.max_position_embeddings,
  }
  with new_folder(output) as folder:
    shards = ShardWriter(folder, max_shard_bytes=SHARD_BYTES)
    for path, value in nnx.to_flat_state(nnx.state(model)):
      array = np.asarray(value[...]).astype(jnp.bfloat16)
      # A dense kernel is [in, out] in Flax and [out, in] in the file.
      shards.add(tensor_name(path), array.T if path[-1] == "kernel" else array)
    shards.close()
    write_json(folder / "config.json", config_to_hf(model.config) | {"dtype": "bfloat16"})
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    (folder / "tokenizer.json").write_text(corpus.tokenizer, encoding="utf-8")
    (folder / "heldout.txt").write_bytes(corpus.sample.encode())
    write_json(folder / "training.json", facts | {"corpus": dict(corpus.facts)})


def show(output: Path) -> None:
  """Loads the checkpoint as any user does, scores it on the held-out sample and lets it continue a few prompts."""
  model = load_model(output)
  sample = (output / "heldout.txt").read_bytes().decode()
  tokens = np.array(model.tokenizer.encode(sample))
  score = perplexity(model, tokens, window=model.config.max_position_embeddings)
  bits = math.log2(score) * len(tokens) / len(sample.encode())
  print(f"held-out sample: {len(tokens)} tokens, perplexity {score:.2f}, about {bits:.2f} bits a byte")
  for prompt, text in zip(PROMPTS, generate(model, list(PROMPTS), max_new_tokens=40), strict=True):
    print(f"--- {prompt!r}\n{prompt}{text}")


def main() -> None:
  """Prepares the corpus, trains, writes the checkpoint, scores it on the held-out sample and lets it write a little."""
  parser = argparse.ArgumentParser(description="Trains the demo model.")
  stdlib = Path(sysconfig.get_paths()["stdlib"])
  parser.add_argument("--source", type=Path, default=stdlib, help="folder of .py files, or what --prepare wrote")
  parser.add_argument("--output", type=Path, help="the checkpoint folder to write; must not exist")
  parser.add_argument("--prepare", type=Path, metavar="FILE", help="only write the tokenized corpus to FILE")
  parser.add_argument("--steps", type=int, help="optimizer steps at the most")
  parser.add_argument("--minutes", type=float, default=3.0, help="training time at the most, compiling not counted")
  parser.add_argument("--tiny", action="store_true", help="a toy model and run, for a CPU")
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  if (arguments.output is None) == (arguments.prepare is None):
    parser.error("name one of --output and --prepare")
  if arguments.output is not None and arguments.output.exists():
    parser.error(f"--output must not exist, and {arguments.output} does")

  recipe = TINY if arguments.tiny else FULL
  if arguments.steps is not None:
    recipe = dataclasses.replace(recipe, steps=arguments.steps)
  if arguments.source.suffix == ".npz":
    corpus = Corpus.load(arguments.source)
  else:
    corpus = build_corpus(
      arguments.source,
      vocab_size=recipe.model.vocab_size,
      held_out=recipe.held_out,
      sample_bytes=recipe.sample_bytes,
    )
  print(f"corpus: {corpus.facts['files']} files, {corpus.facts['bytes']} bytes")
  if arguments.prepare is not None:
    corpus.save(arguments.prepare)
    return

  model, facts = train(corpus, recipe, minutes=arguments.minutes, seed=arguments.seed)
  write_checkpoint(model, corpus, facts, arguments.output)
  show(arguments.output)


if __name__ == "__main__":
  main()
