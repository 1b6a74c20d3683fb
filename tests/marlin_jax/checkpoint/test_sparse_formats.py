# SPDX-License-Identifier: Apache-2.0
"""The 2:4 sparse formats of compressed-tensors: written by their specification, exact or one clear error."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from marlin_jax import SparsePackedTensor, unpack
from marlin_jax.checkpoint import CheckpointError, load_model, marlin24, open_checkpoint, quantize_tensors
from marlin_jax.checkpoint.quantized_layers import quantized_layers
from marlin_jax.quantized import PackedTensor, QuantSpec
from pallas_kernels import layout24
from pallas_kernels.layout import zero_code
from tests.marlin_jax.checkpoint.test_foreign_formats import (
  LAYER,
  ct,
  of_one,
  settings,
  tensors_of,
  with_value,
  words_along,
)
from tests.marlin_jax.checkpoint.test_foreign_formats import quantized_layers as layers_of
from tests.pallas_kernels.problems import sparse24_codes

DATA = Path(__file__).parents[2] / "data"
MARLIN24, FLOAT = DATA / "ctold-marlin24-int4-g128", DATA / "llama3rope-tied-bf16"
GATE = "model.layers.0.mlp.gate_proj"


# marlin-24, entry by entry.


def padded_positions(quad) -> tuple[int, int]:
  """What the tool keeps of a quad; where fewer than two are not zero, in its own way and not in ours."""
  kept = tuple(np.flatnonzero(quad))
  return kept if len(kept) == 2 else {(): (2, 3), (0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3)}[kept]


def marlin24_tensors(codes: np.ndarray, scales: np.ndarray, bits: int, group_size: int | None):
  """weight_packed, meta and scale_packed of 2:4 sparse codes [K, N]."""
  k, n = codes.shape
  steps = codes.astype(int) - zero_code(bits)
  quads = steps.reshape(k // 4, 4, n)
  patterns = ((quads != 0) << np.arange(4)[None, :, None]).sum(axis=1)
  positions = np.full((16, 2), 4)
  for pattern in range(16):
    if pattern.bit_count() <= 2:
      positions[pattern] = padded_positions([pattern >> i & 1 for i in range(4)])
  chosen = positions[patterns].transpose(0, 2, 1)  # [K/4, 2, N]
  kept = np.take_along_axis(quads, chosen, axis=1).reshape(k // 2, n)
  nibbles = (chosen[:, 0] | chosen[:, 1] << 2).T
  # Four quads in an int16, the first in the low bits; then every one is moved to its place.
  meta = sum(nibbles[:, i::4] << 4 * i for i in range(4))  # [N, K/16]
  r, c = np.meshgrid(np.arange(n), np.arange(k // 16), indexing="ij")
  row = r // 64 * 64 + (r % 2) * 2 + (r % 8) // 4 + ((r % 32) % 4) // 2 * 32 + ((r % 64) // 8) * 4
  down, up = (row % 2 == 0) & (c % 2 == 1), (row % 2 == 1) & (c % 2 == 0)
  row, column = row + down - up, c - down + up
  moved = np.zeros(n * k // 16, np.uint16)
  moved[column // 2 * 2 * n + 2 * row + column % 2] = meta
  order = []
  for lane in range(32):
    for j in range(4):
      entries = [
        16 * row + lane // 4 // 2 * 256 + 8 * (lane // 4 % 2) + 4 * block + j
        for block in (0, 1)
        for row in (2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4 + 4), 2 * (lane % 4 + 4) + 1)
      ]
      # In every 8 entries, or with 8 bits in every 4.
      order += [entries[i] for i in ((0, 2, 4, 6, 1, 3, 5, 7) if bits == 4 else (0, 2, 1, 3, 4, 6, 5, 7))]
  tiles = (kept + zero_code(bits)).reshape(k // 32, 16, n // 16, 16).transpose(0, 2, 1, 3).reshape(k // 32, -1, 1024)
  if group_size is not None and group_size < k // 2:  # the tool compares with the compressed K
    scales = scales.reshape(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(scales.shape)
  return {
    "weight_packed": words_along(1, tiles[..., order].reshape(k // 32, 16 * n), bits),
    "meta": moved.view(np.int16).reshape(k // 32, 2 * n),
    "scale_packed": scales,
  }


def random_codes(rng, k, n, bits, density=None):
  codes = np.asarray(sparse24_codes(rng, k, n, density)).astype(int) - 8
  return codes + 8 if bits == 4 else np.where(codes == 0, 0, codes * 16 + rng.integers(1, 9, codes.shape)) + 128


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k, group_size", [(128, None), (256, 128), (512, 128), (512, None)])
def test_decoding_undoes_the_specified_order(rng, k, group_size, bits):
  n = 128
  codes = random_codes(rng, k, n, bits)
  scales = rng.uniform(0.5, 1, (k // (group_size or k), n)).astype(np.float16)
  tensors = marlin24_tensors(codes, scales, bits, group_size)
  nibbles = marlin24.decode_meta(tensors["meta"])
  assert set(np.unique(nibbles)) <= set(layout24.POSITIONS)
  arrays = (jnp.asarray(part) for part in (tensors["weight_packed"], nibbles, tensors["scale_packed"]))
  decoded = marlin24.decode(*arrays, bits=bits)
  np.testing.assert_array_equal(decoded[0], codes)
  np.testing.assert_array_equal(decoded[1], scales)


@pytest.mark.parametrize("bits, kind", [(4, SparsePackedTensor), (8, PackedTensor)])
@pytest.mark.parametrize("group_size", [128, None])
def test_4_bits_stay_sparse_and_8_bits_become_dense_with_the_same_weights(tmp_path, rng, bits, kind, group_size):
  shutil.copytree(MARLIN24, tmp_path, dirs_exist_ok=True)
  expected, replaced = {}, {}
  for name, layer in layers_of(load_model(MARLIN24)).items():
    k, n = layer.in_features, layer.out_features
    codes = random_codes(rng, k, n, bits)
    scales = rng.uniform(0.01, 0.02, (k // (group_size or k), n)).astype(np.float16)
    expected[name] = scales.astype(np.float32).repeat(group_size or k, axis=0) * (codes - zero_code(bits))
    tensors = marlin24_tensors(codes, scales, bits, group_size)
    replaced |= {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}
  tensors_of(tmp_path, lambda tensors: tensors.update(replaced))
  ct(num_bits=bits, group_size=group_size, strategy="group" if group_size else "channel")(tmp_path)
  for name, layer in layers_of(load_model(tmp_path)).items():
    assert type(layer.packed) is kind and layer.packed.bits == bits
    np.testing.assert_array_equal(unpack(layer.packed).dequantize(), expected[name], err_msg=name)


def meta_with(nibble: int):
  """The positions of one quad in place of others: nibble 2 of the fourth word, which is k = 8 .. 11 of column 33."""

  def function(meta):
    meta = meta.copy()
    meta.view(np.uint16).flat[3] = meta.view(np.uint16).flat[3] & 0xF0FF | nibble << 8
    return meta

  return of_one("meta", function)


def halve(folder: Path):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN_MARLIN24 = {
  "truncated": (halve, r"model\.safetensors is not a whole safetensors file"),
  "words of another dtype": (
    of_one("weight_packed", lambda t: t.astype(np.int64)),
    "k_proj.weight_packed is int64, must be int32",
  ),
  "words missing": (of_one("weight_packed", lambda _: None), r"k_proj.weight_packed of shape \(8, 256\) is missing"),
  "words of another shape": (
    of_one("weight_packed", lambda t: t[:-1]),
    r"k_proj.weight_packed has shape \(7, 256\), must have \(8, 256\)",
  ),
  "positions missing": (of_one("meta", lambda _: None), r"k_proj.meta of shape \(8, 256\) is missing"),
  "positions of another dtype": (of_one("meta", lambda t: t.astype(np.int32)), "k_proj.meta is int32, must be int16"),
  "positions of another shape": (
    of_one("meta", lambda t: t.reshape(16, 128)),
    r"k_proj.meta has shape \(16, 128\), must have \(8, 256\)",
  ),
  "equal positions": (meta_with(0b1010), r"k_proj.meta has positions 2 and 2 for k=\d+..\d+, n=\d+, must have two asc"),
  "positions out of order": (meta_with(0b0111), "k_proj.meta has positions 3 and 1 for"),
  "scales missing": (of_one("scale_packed", lambda _: None), r"k_proj.scale_packed of shape \(2, 128\) is missing"),
  "scale of zero": (of_one("scale_packed", with_value(0)), "k_proj.scale_packed has zeros"),
  "scale of NaN": (of_one("scale_packed", with_value(np.nan)), "k_proj.scale_packed has NaN"),
  "8 bits in words of 4": (ct(num_bits=8), r"weight_packed has shape \(8, 256\), must have \(8, 512\)"),
  "whole columns that are groups": (
    ct(strategy="channel", group_size=None),
    r"scale_packed has shape \(\d, \d+\), must have \(1, \d+\)",
  ),
  "no groups": (settings(config_groups=None), "config_groups must be an object of objects"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN_MARLIN24.values(), ids=BROKEN_MARLIN24.keys())
def test_broken_marlin24_checkpoints(tmp_path, damage, message):
  shutil.copytree(MARLIN24, tmp_path, dirs_exist_ok=True)
  damage(tmp_path)
  with pytest.raises(CheckpointError, match=message):
    load_model(tmp_path)


def test_the_place_of_a_wrong_position_is_named(tmp_path):
  shutil.copytree(MARLIN24, tmp_path, dirs_exist_ok=True)
  before = marlin24.decode_meta(load_file(tmp_path / "model.safetensors")[f"{LAYER}.meta"])
  meta_with(0b1111)(tmp_path)
  after = marlin24.decode_meta(load_file(tmp_path / "model.safetensors")[f"{LAYER}.meta"])
  ((quad, column),) = np.argwhere(before != after)
  with pytest.raises(CheckpointError, match=rf"positions 3 and 3 for k={4 * quad}..{4 * quad + 3}, n={column}, must"):
    load_model(tmp_path)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (ct(num_bits=2), "has 2 bits"),
    (ct(symmetric=False), "has zero points, which the marlin-24 format does not have"),
    (ct(group_size=64), "the marlin-24 format has groups of 128 or whole columns, not of 64"),
    (
      settings("config_groups", "group_0", input_activations={"num_bits": 8}),
      r"layer model\.layers\.\S+ has quantized input activations",
    ),
    (settings(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config has the format 'sparse-24-bitmask'"),
  ],
)
def test_what_marlin24_does_not_have_is_refused_by_name(tmp_path, change, message):
  shutil.copytree(MARLIN24, tmp_path, dirs_exist_ok=True)
  change(tmp_path)
  with pytest.raises(NotImplementedError, match=message):
    load_model(tmp_path)


@pytest.mark.parametrize("k, n", [(48, 64), (64, 96)])
def test_sizes_that_marlin24_cannot_have_are_refused(k, n):
  hf = json.loads((MARLIN24 / "config.json").read_text())
  layers = quantized_layers(hf, open_checkpoint(MARLIN24))
  with pytest.raises(CheckpointError, match=f"layer {LAYER} has K={k} and N={n}, .* multiples of 32 and 64"):
    layers.shapes(LAYER, k, n)


# sparse-24-bitmask.


def bitmask_tensors(w: np.ndarray) -> dict[str, np.ndarray]:
  """compressed, bitmask and shape of a 2:4 sparse weight [N, K]: bit k % 8 of byte k // 8 is column k."""
  n, k = w.shape
  kept = np.argsort((w == 0).reshape(n, k // 4, 4), axis=-1, kind="stable")[..., :2]
  mask = np.zeros((n, k // 4, 4), bool)
  np.put_along_axis(mask, kept, True, axis=-1)
  mask = mask.reshape(n, k)
  bitmask = np.packbits(mask, axis=1, bitorder="little")
  return {"compressed": w[mask].reshape(n, k // 2), "bitmask": bitmask, "shape": np.array([[n], [k]], np.int64)}


def prune(w: np.ndarray) -> np.ndarray:
  """The two largest of every four along K, [N, K]."""
  size = np.abs(w.astype(np.float32)).reshape(w.shape[0], -1, 4)
  rank = np.argsort(np.argsort(-size, axis=-1), axis=-1)
  return np.where(rank < 2, w.reshape(size.shape), np.zeros((), w.dtype)).reshape(w.shape)


@pytest.fixture(scope="module")
def bitmask(tmp_path_factory):
  """(a folder in this format, the pruned weights that it holds)."""
  folder = tmp_path_factory.mktemp("bitmask") / "model"
  shutil.copytree(FLOAT, folder)
  tensors, pruned = load_file(folder / "model.safetensors"), {}
  for name in [name for name in tensors if name.endswith("_proj.weight")]:
    pruned[name] = prune(tensors.pop(name))
    parts = bitmask_tensors(pruned[name])
    tensors |= {f"{name.removesuffix('.weight')}.{leaf}": np.ascontiguousarray(part) for leaf, part in parts.items()}
  save_file(tensors, folder / "model.safetensors")
  config = json.loads((folder / "config.json").read_text())
  sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": []}
  config["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
  (folder / "config.json").write_text(json.dumps(config))
  return folder, pruned


def kernels_of(model):
  return {
    f"model.layers.{i}.{theirs}.{name}.weight": np.asarray(getattr(getattr(layer, ours), name).kernel[...]).T
    for i, layer in enumerate(model.layers)
    for ours, theirs, names in (
      ("attention", "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
      ("mlp", "mlp", ("gate_proj", "up_proj", "down_proj")),
    )
    for name in names
  }


def test_sparse_floats_come_out_dense_with_their_zeros(bitmask):
  folder, pruned = bitmask
  kernels = kernels_of(load_model(folder))
  assert kernels.keys() == pruned.keys()
  for name, w in pruned.items():
    np.testing.assert_array_equal(kernels[name], w, err_msg=name, strict=True)
    assert (w == 0).mean() == 0.5


def test_a_pruned_checkpoint_is_quantized_and_keeps_what_it_kept(bitmask, tmp_path):
  folder, pruned = bitmask
  quantize_tensors(folder, tmp_path / "out", QuantSpec(group_size=64, sparse24=True), progress=False)
  for name, layer in layers_of(load_model(tmp_path / "out")).items():
    w = np.asarray(unpack(layer.packed).dequantize()).T
    assert (w[pruned[f"{name}.weight"] == 0] == 0).all()
    want = pruned[f"{name}.weight"].astype(np.float32)
    assert np.linalg.norm(w - want) < 0.12 * np.linalg.norm(want)


def of_gate(leaf, function):
  def change(tensors):
    tensors[f"{GATE}.{leaf}"] = function(tensors[f"{GATE}.{leaf}"])
    if tensors[f"{GATE}.{leaf}"] is None:
      del tensors[f"{GATE}.{leaf}"]

  return lambda folder: tensors_of(folder, change)


def keep(bits: int):
  """A mask whose byte 3, k = 24 .. 31, is another in row 2."""

  def function(mask):
    mask = mask.copy()
    mask[2, 3] = bits
    return mask

  return of_gate("bitmask", function)


BROKEN_BITMASK = {
  "truncated": (halve, r"model\.safetensors is not a whole safetensors file"),
  "three kept": (keep(0b00110111), r"gate_proj.bitmask keeps 3 of k=24..27, n=2, must keep two of every four"),
  "one kept": (keep(0b00010011), r"gate_proj.bitmask keeps 1 of k=28..31, n=2, must keep two of every four"),
  "weights missing": (of_gate("compressed", lambda _: None), "gate_proj.compressed is missing"),
  "mask missing": (of_gate("bitmask", lambda _: None), "gate_proj.bitmask is missing"),
  "shape missing": (of_gate("shape", lambda _: None), "gate_proj.shape is missing"),
  "weights of another dtype": (
    of_gate("compressed", lambda t: t.astype(np.float64)),
    "gate_proj.compressed is float64, must be bfloat16, float16 or float32",
  ),
  "weights of another shape": (
    of_gate("compressed", lambda t: t[:, :-1]),
    r"gate_proj.weight has shape \(256, 126\), must have \(256, 128\)",
  ),
  "flat weights": (of_gate("compressed", np.ravel), r"gate_proj.compressed has shape \(16384,\), must have two dim"),
  "weights of NaN": (of_gate("compressed", with_value(np.nan)), "gate_proj.weight has NaN or infinite values"),
  "mask of another dtype": (
    of_gate("bitmask", lambda t: t.astype(np.int32)),
    "gate_proj.bitmask is int32, must be",
  ),
  "mask of another shape": (
    of_gate("bitmask", lambda t: t[:, :-1]),
    r"gate_proj.bitmask has shape \(256, 15\), must have \(256, 16\)",
  ),
  "another shape": (of_gate("shape", lambda t: t[::-1]), r"gate_proj.shape holds \[128, 256\], must hold \[256, 128\]"),
  "shape of another dtype": (of_gate("shape", lambda t: t.astype(np.int32)), "gate_proj.shape is int32, must be int64"),
  "a weight that is stored twice": (
    lambda folder: tensors_of(folder, lambda t: t.update({f"{GATE}.weight": np.zeros((256, 128), np.float32)})),
    "gate_proj.weight is stored twice, as model.layers.0.mlp.gate_proj.compressed too",
  ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN_BITMASK.values(), ids=BROKEN_BITMASK.keys())
def test_broken_bitmask_checkpoints(tmp_path, bitmask, damage, message):
  shutil.copytree(bitmask[0], tmp_path, dirs_exist_ok=True)
  damage(tmp_path)
  with pytest.raises(CheckpointError, match=message):
    load_model(tmp_path)
