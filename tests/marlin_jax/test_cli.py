# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import re
import shutil

import jax
import pytest
from flax import nnx

from marlin_jax import QuantLinear, generate, load_model
from marlin_jax.cli import main
from marlin_jax.demo import run as demo_run

LLAMA = pathlib.Path(__file__).parent.parent / "data" / "llama-bf16"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cli") / "quantized"
  assert main(["quantize", str(LLAMA), str(folder), "--group-size", "64"]) == 0
  return folder


def test_quantize_writes_a_folder_that_loads(quantized):
  config = json.loads((quantized / "config.json").read_text())
  assert config["quantization_config"]["group_size"] == 64
  assert load_model(quantized).layers[0].mlp.up_proj.packed.group_size == 64


def test_inspect_says_what_is_there(quantized, capsys):
  assert main(["inspect", str(quantized)]) == 0
  out = capsys.readouterr().out
  assert "LlamaForCausalLM: 2 layers, hidden size 256, vocabulary 512, context 256" in out
  assert "14 quantized layers" in out and "4 bits, groups of 64" in out and "tokenizer.json" in out


def test_a_sparse_copy_is_written_and_said_to_be_one(tmp_path, capsys):
  folder = tmp_path / "sparse"
  assert main(["quantize", str(LLAMA), str(folder), "--group-size", "64", "--sparse24"]) == 0
  assert "14 quantized layers" in (out := capsys.readouterr().out) and "4 bits, groups of 64, 2:4 sparse" in out
  assert load_model(folder).layers[0].mlp.up_proj.packed.meta is not None
  assert main(["generate", str(folder), "--prompt", "Hello", "--max-new-tokens", "3"]) == 0
  assert main(["quantize", str(LLAMA), str(tmp_path / "not"), "--bits", "8", "--sparse24"]) == 2
  assert "sparse24 with bits=8 and symmetric=True is not implemented" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_the_output_head_is_quantized_when_asked_for(format, tmp_path, capsys):
  folder, options = tmp_path / "whole", ["--group-size", "64", "--format", format, "--quantize-head"]
  assert main(["quantize", str(LLAMA), str(folder), *options]) == 0
  assert "15 quantized layers" in capsys.readouterr().out
  model = load_model(folder)
  assert isinstance(model.lm_head, QuantLinear) and model.lm_head.out_features == model.config.vocab_size
  assert main(["generate", str(folder), "--prompt", "Hello", "--max-new-tokens", "3"]) == 0
  assert "15 quantized layers" in capsys.readouterr().err


def test_a_head_that_is_the_embedding_table_is_not_quantized(tmp_path, capsys):
  source = str(LLAMA.parent / "llama3rope-tied-bf16")
  assert main(["quantize", source, str(tmp_path / "whole"), "--quantize-head"]) == 2
  assert f"the head of {source} is its embedding table" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gptq-int4-g128-sym", "ct-int4-g128-sym", "marlin-orig-g128"])
def test_inspect_counts_the_bytes_of_other_tools_formats(name, capsys):
  assert main(["inspect", str(LLAMA.parent / name)]) == 0
  (line,) = [line for line in capsys.readouterr().out.splitlines() if "quantized layers" in line]
  count, size = re.match(r"(\d+) quantized layers, ([\d.]+) MB: 4 bits, groups of 128", line).groups()
  # Half a byte a weight, and a little for scales and what else the format stores.
  weights = sum(layer.packed.k * layer.out_features for layer in quantized_layers_of(name))
  assert int(count) == 14 and 0.5 * weights < 1e6 * float(size) < 0.6 * weights


def quantized_layers_of(name):
  model = load_model(LLAMA.parent / name)
  return [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, QuantLinear)]


def test_inspect_of_a_float_checkpoint(capsys):
  assert main(["inspect", str(LLAMA)]) == 0
  assert "no quantized layers" in capsys.readouterr().out


def test_generate_writes_what_the_python_call_returns(quantized, capsys):
  assert main(["generate", str(quantized), "--prompt", "Hello", "--max-new-tokens", "20"]) == 0
  out, err = capsys.readouterr()
  assert out == generate(load_model(quantized), "Hello", max_new_tokens=20) + "\n"
  assert "plain JAX (reference) on cpu; the kernels need an NVIDIA GPU" in err or "Pallas kernel triton" in err
  assert "20 tokens, the first after" in err


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["inspect", "no/such/folder"], "no/such/folder"),
    (["generate", str(LLAMA), "--prompt", ""], "prompt is empty"),
    (["generate", str(LLAMA), "--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
    (["generate", str(LLAMA), "--prompt", "a", "--max-new-tokens", "300"], "context"),
    (["quantize", str(LLAMA), "unused", "--group-size", "48"], "group_size=48 does not divide k=256"),
    (["quantize", str(LLAMA), "unused", "--bits", "3"], "bits=3 is not implemented"),
  ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert main(arguments) == 2
  err = capsys.readouterr().err
  assert message in err and err.splitlines()[-1].startswith("marlin-jax: ") and "Traceback" not in err
  assert not list(tmp_path.iterdir())


def test_a_quantized_checkpoint_is_not_quantized_again(quantized, tmp_path, capsys):
  assert main(["quantize", str(quantized), str(tmp_path / "again")]) == 2
  assert "is quantized already" in capsys.readouterr().err


def test_demo_tells_the_whole_story(capsys):
  demo_run.run_demo(max_new_tokens=10, windows=1)
  out = capsys.readouterr().out
  assert "quantized 56 layers, 35.7 MB -> 9.2 MB" in out
  before, after = (float(part.split()[0]) for part in out.split("perplexity ")[1].split(" in bfloat16, "))
  # The first window of the held-out text is its hardest; over all of it the perplexity is 9.1.
  assert before == pytest.approx(34.9, rel=0.02) and before != after and abs(after / before - 1) < 0.03
  assert demo_run.PROMPT in out and "10 tokens" in out
  assert "plain JAX (reference) on cpu" in out or "Pallas kernel triton on NVIDIA" in out


def test_a_checkpoint_without_a_tokenizer_is_named(quantized, tmp_path, capsys):
  shutil.copytree(quantized, tmp_path / "mute")
  (tmp_path / "mute" / "tokenizer.json").unlink()
  assert main(["generate", str(tmp_path / "mute"), "--prompt", "a"]) == 2
  assert "no tokenizer" in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
@pytest.mark.parametrize(
  "arguments",
  [["tune", "--output", "TABLE"], ["tune", "--output", "TABLE", "--model", str(LLAMA)], ["bench", "matmul"]],
)
def test_measuring_without_a_gpu_says_so(arguments, tmp_path, capsys):
  table = str(tmp_path / "table.json")
  assert main([table if argument == "TABLE" else argument for argument in arguments]) == 2
  out, err = capsys.readouterr()
  assert "on an NVIDIA GPU, and this is cpu: nothing" in err and not out and not list(tmp_path.iterdir())


def test_a_shape_that_is_none_is_named(capsys):
  assert main(["bench", "matmul", "--shapes", "4096by4096"]) == 2
  assert "shape '4096by4096' must be KxN" in capsys.readouterr().err


def test_quantize_calibrates_on_the_text_it_is_given(small_checkpoint, tmp_path, capsys):
  (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
  text = ["--calibration", str(tmp_path / "text.txt"), "--calibration-count", "2", "--calibration-length", "32"]
  command = ["quantize", str(small_checkpoint), str(tmp_path / "out"), "--method", "gptq", "--act-order", *text]
  assert main(command) == 0
  assert "14 quantized layers" in capsys.readouterr().out
  assert load_model(tmp_path / "out").layers[0].mlp.up_proj.permutation is not None
  assert (
    main([*command[:2], str(tmp_path / "other"), "--method", "awq", "--calibration", str(tmp_path / "no.txt")]) == 2
  )
  assert "no.txt is no text that can be read" in capsys.readouterr().err
  command = [*command[:2], str(tmp_path / "sparse"), "--sparse24", "--method", "wanda", "--group-size", "64", *text]
  assert main(command) == 0
  assert "14 quantized layers" in (out := capsys.readouterr().out) and "2:4 sparse" in out
