"""Microsoft's BEATs checkpoints as published: read once and safely, checked, and kept as safetensors.

A checkpoint holds ``cfg`` (sizes) and ``model`` (tensors under published names), pre-trained or fine-tuned; the head
of a fine-tuned one is left out. It is opened with ``weights_only=True``, checked name by name and size by size, and
kept in the cache as safetensors with a JSON sidecar; after that nothing pickled is opened, unless the copy is
damaged. Weights that only make sense together are folded on the way: query, key and value projections; the
weight-normalised kernel of the positional convolution; the sums of the position gate. What does not fit is refused
with a ``UserError`` of one line: what was found, what was wanted.

    python -m trainables.encoders.beats_checkpoint --out random.pt    # random weights in this format, to try things
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainables.errors import UserError
from trainables.files import content_digest, exclusive, replacing, write_atomically
from trainables.settings import build, to_dict

REVISION = 1  # counts changes of how a checkpoint is converted
WHERE = "https://github.com/microsoft/unilm/tree/master/beats"
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class BeatsShape:
    """The part of a checkpoint's ``cfg`` that decides what its tensors mean, under its published names."""

    input_patch_size: int = 16
    embed_dim: int = 512
    conv_bias: bool = False
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    activation_fn: str = "gelu"
    layer_norm_first: bool = False
    deep_norm: bool = True
    conv_pos: int = 128
    conv_pos_groups: int = 16
    relative_position_embedding: bool = True
    num_buckets: int = 320
    max_distance: int = 800
    gru_rel_pos: bool = True


# What every published checkpoint has, and this implementation takes for granted.
FIXED = {
    "conv_bias": False,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}


def open_checkpoint(path: Path, cache_dir: Path | None) -> tuple[BeatsShape, Weights]:
    """Sizes and weights of a published checkpoint, from the copy in ``cache_dir`` if there is a sound one.

    Also of a copy itself, a safetensors file with its JSON beside it.

    Raises:
        UserError: not a BEATs checkpoint.
    """
    if path.suffix == ".safetensors" and (copy := _read_kept(path)) is not None:
        return copy
    if cache_dir is None:
        return read(path)
    sha = content_digest(path)
    kept = cache_dir / f"beats-{sha[:16]}-{REVISION}.safetensors"
    with exclusive(kept):
        found = _read_kept(kept)
        if found is None:
            found = read(path)
            _keep(kept, path, sha, *found)
    return found


def keep_checkpoint(kept: Path, path: Path) -> None:
    """Write a published checkpoint as a copy that ``open_checkpoint`` takes. Raises UserError as that."""
    _keep(kept, path, content_digest(path), *open_checkpoint(path, None))


def read(path: Path) -> tuple[BeatsShape, Weights]:
    """Sizes and converted weights of a published checkpoint.

    Raises:
        UserError: what was found is not what was wanted, in one line.
    """

    def refuse(found: object, wanted: str) -> UserError:
        text = " ".join(str(found).split())[:200]
        return UserError(f"encoder.checkpoint = {str(path)!r}: found {text}; wanted {wanted}")

    whole = f"a BEATs checkpoint as published ({WHERE}): a .pt file with 'cfg' and 'model'"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ):  # files of other kinds, cut short or with code in them fail in many ways with one remedy
        raise refuse("a file that is damaged or no checkpoint of plain weights", whole) from None
    if not isinstance(content, dict) or not {"cfg", "model"} <= content.keys():
        keys = sorted(map(str, content))[:4] if isinstance(content, dict) else [type(content).__name__]
        raise refuse(f"a checkpoint of something else ({', '.join(keys) or 'empty'})", whole)
    cfg, model = content["cfg"], content["model"]
    if not isinstance(cfg, dict) or not isinstance(model, dict):
        raise refuse(f"cfg as {type(cfg).__name__} and model as {type(model).__name__}", whole)
    try:
        shape = build(BeatsShape, {f.name: cfg[f.name] for f in fields(BeatsShape)})
        sizes = published_sizes(shape) if shape.encoder_layers <= len(model) else {}
    except (KeyError, UserError, ZeroDivisionError) as error:
        raise refuse(f"a cfg without a usable {error}", "the cfg of a BEATs encoder") from None
    if not sizes:
        raise refuse(
            f"{len(model)} tensors for {shape.encoder_layers} layers", "the weights of a whole encoder"
        )
    for key, value in FIXED.items():
        if getattr(shape, key) != value:
            raise refuse(f"cfg.{key} = {getattr(shape, key)!r}", f"{value!r}, as all published BEATs have")
    if any(isinstance(v, int) and not isinstance(v, bool) and v < 1 for v in to_dict(shape).values()):
        raise refuse(f"a cfg with sizes below 1 ({to_dict(shape)})", "the cfg of a BEATs encoder")
    if shape.encoder_embed_dim % shape.encoder_attention_heads:
        found = f"a cfg {shape.encoder_embed_dim} wide with {shape.encoder_attention_heads} heads"
        raise refuse(found, "the cfg of a BEATs encoder")
    model = {str(k): v for k, v in model.items() if not str(k).startswith("predictor.")}
    wants = f"what its cfg says ({shape.encoder_layers} layers of {shape.encoder_embed_dim})"
    for name in sorted(sizes.keys() ^ model.keys()):
        raise refuse(f"{'no' if name in sizes else 'also a'} tensor {name}", wants)
    for name, size in sizes.items():
        tensor = model[name]
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != size:
            has = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise refuse(f"{name} as {has}", f"{list(size)}, {wants}")
        if not tensor.isfinite().all():
            raise refuse(f"numbers in {name} that are not finite", "weights that are")
    return shape, convert(model, shape)


def published_sizes(shape: BeatsShape) -> dict[str, tuple[int, ...]]:
    """Names and sizes of the tensors of a pre-trained checkpoint."""
    d, inner, narrow, heads = (
        shape.encoder_embed_dim,
        shape.encoder_ffn_embed_dim,
        shape.embed_dim,
        shape.encoder_attention_heads,
    )
    sizes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (narrow, 1, shape.input_patch_size, shape.input_patch_size),
        "encoder.pos_conv.0.weight_g": (1, 1, shape.conv_pos),
        "encoder.pos_conv.0.weight_v": (d, d // shape.conv_pos_groups, shape.conv_pos),
        "encoder.pos_conv.0.bias": (d,),
    }

    def pair(name: str, out: int, into: int | None = None) -> None:
        sizes[f"{name}.weight"], sizes[f"{name}.bias"] = ((out, into) if into else (out,)), (out,)

    pair("layer_norm", narrow)
    pair("encoder.layer_norm", d)
    if narrow != d:
        pair("post_extract_proj", d, narrow)
    for layer in range(shape.encoder_layers):
        at = f"encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            pair(f"{at}.self_attn.{name}", d, d)
        pair(f"{at}.self_attn.grep_linear", 8, d // heads)
        sizes[f"{at}.self_attn.grep_a"] = (1, heads, 1, 1)
        sizes[f"{at}.self_attn.relative_attention_bias.weight"] = (shape.num_buckets, heads)
        pair(f"{at}.self_attn_layer_norm", d)
        pair(f"{at}.final_layer_norm", d)
        pair(f"{at}.fc1", inner, d)
        pair(f"{at}.fc2", d, inner)
    return sizes


def convert(model: Mapping[str, Tensor], shape: BeatsShape) -> Weights:
    """Published tensors under this implementation's names, float32."""
    w = {name: tensor.float() for name, tensor in model.items()}
    kernel = w["encoder.pos_conv.0.weight_v"]
    kernel = kernel * (w["encoder.pos_conv.0.weight_g"] / kernel.norm(dim=(0, 1), keepdim=True))
    made = {
        "patch.weight": w["patch_embedding.weight"],
        "position.weight": kernel,
        "position.bias": w["encoder.pos_conv.0.bias"],
        "position_bias": w["encoder.layers.0.self_attn.relative_attention_bias.weight"],
    }
    names = {"patch_norm": "layer_norm", "norm": "encoder.layer_norm"}
    if shape.embed_dim != shape.encoder_embed_dim:
        names["project"] = "post_extract_proj"
    for i in range(shape.encoder_layers):
        at, attention = f"encoder.layers.{i}", f"encoder.layers.{i}.self_attn"
        names |= {f"blocks.{i}.out": f"{attention}.out_proj", f"blocks.{i}.norm1": f"{attention}_layer_norm"}
        names |= {f"blocks.{i}.up": f"{at}.fc1", f"blocks.{i}.down": f"{at}.fc2"}
        names[f"blocks.{i}.norm2"] = f"{at}.final_layer_norm"
        for part in ("weight", "bias"):
            qkv = [w[f"{attention}.{name}_proj.{part}"] for name in "qkv"]
            made[f"blocks.{i}.qkv.{part}"] = torch.cat(qkv)
            made[f"blocks.{i}.gate.{part}"] = w[f"{attention}.grep_linear.{part}"].unflatten(0, (2, 4)).sum(1)
        made[f"blocks.{i}.gate_scale"] = w[f"{attention}.grep_a"].flatten()
    made |= {f"{ours}.{p}": w[f"{theirs}.{p}"] for ours, theirs in names.items() for p in ("weight", "bias")}
    return {name: tensor.contiguous() for name, tensor in made.items()}


def _keep(kept: Path, path: Path, sha: str, shape: BeatsShape, weights: Weights) -> None:
    from safetensors.torch import save_file

    with replacing(kept) as partial:
        save_file(weights, partial)
    sidecar = {"cfg": to_dict(shape), "source": path.name, "source_sha256": sha}
    sidecar["sha256"] = content_digest(kept)
    write_atomically(kept.with_suffix(".json"), json.dumps(sidecar, indent=1) + "\n")


def _read_kept(kept: Path) -> tuple[BeatsShape, Weights] | None:
    """What an earlier conversion left, or None if there is none or it is not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        sidecar = json.loads(kept.with_suffix(".json").read_text())
        if content_digest(kept) != sidecar["sha256"]:
            return None
        return build(BeatsShape, sidecar["cfg"]), load_file(kept)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError, SafetensorError):
        return None


def random_checkpoint(shape: BeatsShape, seed: int = 0) -> dict[str, Any]:
    """Random weights in the published format, scaled so that tokens stay apart."""
    rng = torch.Generator().manual_seed(seed)
    model: dict[str, Tensor] = {}
    for name, size in published_sizes(shape).items():
        if "norm.weight" in name or "grep_a" in name:
            model[name] = torch.ones(size)
        elif name.endswith("bias"):
            model[name] = torch.zeros(size)
        else:
            model[name] = torch.randn(size, generator=rng) * math.prod(size[1:]) ** -0.5
    kernel = "encoder.pos_conv.0.weight"
    model[f"{kernel}_g"] = model[f"{kernel}_v"].norm(dim=(0, 1), keepdim=True)
    for name in model:
        if "relative_attention_bias" in name:
            model[name] = model["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    return {"cfg": to_dict(shape) | {"finetuned_model": False}, "model": model}


def main() -> None:
    """Write random weights: to try memory, speed and wiring before the real ones are there."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sizes = {"encoder_embed_dim": given.width, "encoder_ffn_embed_dim": 4 * given.width}
    shape = BeatsShape(encoder_layers=given.layers, encoder_attention_heads=given.width // 64, **sizes)
    torch.save(random_checkpoint(shape, given.seed), given.out)
    print(f"{given.out}  {given.out.stat().st_size / 1e6:.0f} MB, random weights")


if __name__ == "__main__":
    main()
