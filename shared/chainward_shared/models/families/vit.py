"""Vision transformers: timm's ViT and DeiT with plain patches, learned positions and standard blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import JsonValue
from timm.layers import PatchEmbed, resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import nn

from chainward_shared.errors import ModelError
from chainward_shared.models.families import Family, register, scaled_depth, scaled_width
from chainward_shared.models.indices import Axis, Picker

_BLOCK = r"blocks\.\d+\."
_PARAMS = r"\.(?:weight|bias)"


@register
class VisionTransformers(Family):
    """ViT, DeiT (with or without the distillation token), DeiT III, CLIP and SigLIP image towers.

    Axes: the embedding is one axis all through the model. The queries, keys, values and the input of the
    output projection share a second one, on which whole heads are taken, and inside each the same channels, or
    channels of all heads mixed. The hidden layer of the MLP is a third.

    Another image or patch size: positions and patch embedding are resampled as timm does for its own checkpoints
    (bicubic; the patches by the pseudo-inverse of the resizing, FlexiViT, Beyer et al. 2023, arXiv 2212.08013).
    """

    name = "vit"
    examples = "vit_tiny_patch16_224, deit_small_patch16_224"
    size_options = frozenset({"embed_dim", "num_heads", "depth", "mlp_ratio"})
    classifier = re.compile(r"head(_dist)?\..*")
    layer = re.compile(r"(blocks)\.(\d+)")
    resamples_patches = True
    rules = (
        (re.compile(r"cls_token|dist_token|reg_token|pos_embed"), (None, None, "embedding")),
        (re.compile(rf"patch_embed\.(proj|norm){_PARAMS}"), ("embedding",)),
        (re.compile(rf"(norm|norm_pre|fc_norm){_PARAMS}"), ("embedding",)),
        (re.compile(rf"{_BLOCK}norm[12]{_PARAMS}"), ("embedding",)),
        (re.compile(rf"{_BLOCK}ls[12]\.gamma"), ("embedding",)),
        (re.compile(rf"{_BLOCK}attn\.qkv{_PARAMS}"), ("qkv", "embedding")),
        (re.compile(rf"{_BLOCK}attn\.gate{_PARAMS}"), ("attention", "embedding")),
        (re.compile(rf"{_BLOCK}attn\.[qk]_norm{_PARAMS}"), ("head",)),
        (re.compile(rf"{_BLOCK}attn\.norm{_PARAMS}"), ("attention",)),
        (re.compile(rf"{_BLOCK}attn\.proj{_PARAMS}"), ("embedding", "attention")),
        (re.compile(rf"{_BLOCK}mlp\.fc1{_PARAMS}"), ("mlp_in", "embedding")),
        (re.compile(rf"{_BLOCK}mlp\.fc1_[gx]{_PARAMS}"), ("mlp", "embedding")),
        (re.compile(rf"{_BLOCK}mlp\.norm{_PARAMS}"), ("mlp",)),
        (re.compile(rf"{_BLOCK}mlp\.fc2{_PARAMS}"), ("embedding", "mlp")),
        (re.compile(r"attn_pool\.latent"), (None, None, "embedding")),
        (re.compile(rf"attn_pool\.q{_PARAMS}"), ("attention", "embedding")),
        (re.compile(rf"attn_pool\.kv{_PARAMS}"), ("kv", "embedding")),
        (re.compile(rf"attn_pool\.proj{_PARAMS}"), ("embedding", "attention")),
        (re.compile(rf"attn_pool\.norm{_PARAMS}"), ("embedding",)),
        (re.compile(rf"attn_pool\.mlp\.fc1{_PARAMS}"), ("pool_mlp", "embedding")),
        (re.compile(rf"attn_pool\.mlp\.fc2{_PARAMS}"), ("embedding", "pool_mlp")),
        (re.compile(rf"head(_dist)?{_PARAMS}"), (None, "embedding")),
    )

    def matches(self, model: Any) -> bool:
        return (
            isinstance(model, VisionTransformer)
            and isinstance(model.patch_embed, PatchEmbed)
            and len(model.blocks) > 0
            and all(isinstance(block, Block) for block in model.blocks)
        )

    def sizes(self, model: Any) -> dict[str, int]:
        return {
            "embedding width": model.embed_dim,
            "MLP width": model.blocks[0].mlp.fc2.in_features,
            "number of blocks": len(model.blocks),
        }

    def patch_size(self, model: Any) -> int:
        return int(model.patch_embed.patch_size[0])

    def scaled_options(self, model: Any, width: float, depth: float) -> dict[str, JsonValue]:
        heads = model.blocks[0].attn.num_heads
        multiple = math.lcm(8, heads)
        if model.embed_dim * width < multiple:
            multiple = 8
        embed_dim = scaled_width(model.embed_dim, width, multiple)
        return {
            "embed_dim": embed_dim,
            "num_heads": next(divisor for divisor in range(heads, 0, -1) if embed_dim % divisor == 0),
            "depth": scaled_depth(len(model.blocks), depth),
        }

    def kept_options(self, teacher: Any) -> dict[str, JsonValue]:
        scale = getattr(teacher.blocks[0], "ls1", None)
        return {"init_values": scale.init_values} if isinstance(scale, LayerScale) else {}

    def channels(self, teacher: Any, student: Any, picker: Picker) -> Mapping[str, Axis]:
        mlp = picker.axis("mlp", _hidden(teacher.blocks[0].mlp), _hidden(student.blocks[0].mlp))
        # SwiGLU packs gate and value into one projection that is twice as wide as its output
        fc1 = getattr(teacher.blocks[0].mlp, "fc1", None)
        packed = fc1.out_features // mlp.size if fc1 else 1
        attention = _attention_channels(teacher.blocks[0].attn, student.blocks[0].attn, picker)
        axes = attention | {
            "embedding": picker.axis("embedding", teacher.embed_dim, student.embed_dim),
            "qkv": attention["attention"].repeated(3),
            "kv": attention["attention"].repeated(2),
            "mlp": mlp,
            "mlp_in": mlp.repeated(packed),
        }
        if hasattr(getattr(teacher, "attn_pool", None), "mlp"):
            pool_mlps = _hidden(teacher.attn_pool.mlp), _hidden(student.attn_pool.mlp)
            axes["pool_mlp"] = picker.axis("pool_mlp", *pool_mlps)
        return axes

    def resampled(self, parameter: str, weights: torch.Tensor, teacher: Any, student: Any) -> torch.Tensor:
        if parameter == "pos_embed":
            prefix_tokens = 0 if student.no_embed_class else student.num_prefix_tokens
            old, new = teacher.patch_embed.grid_size, student.patch_embed.grid_size
            return resample_abs_pos_embed(weights, list(new), list(old), num_prefix_tokens=prefix_tokens)
        if parameter == "patch_embed.proj.weight":
            return resample_patch_embed(weights, list(student.patch_embed.patch_size))
        return weights


def _hidden(mlp: Any) -> int:
    return int(mlp.fc2.in_features)


def _attention_channels(teacher: Any, student: Any, picker: Picker) -> dict[str, Axis]:
    """Return the axis of all heads' channels laid end to end, and that of one head's channels.

    Whole heads are taken and inside them the same channels, so that a student's head is the reduced copy of
    one teacher's head. Where that is not wanted, or impossible because the student's heads are more or wider than
    the teacher's, the axis is selected as one, as in the paper, which mixes neighbouring heads, and there is no
    axis of one head.
    """
    teacher_size, student_size = teacher.num_heads * teacher.head_dim, student.num_heads * student.head_dim
    mixed = picker.selection.heads == "mixed"
    if mixed and not isinstance(getattr(teacher, "q_norm", None), nn.Identity | None):
        raise ModelError(
            "heads can't be mixed in a ViT that normalises the queries and keys of each head: select whole heads"
        )
    if mixed or student.num_heads > teacher.num_heads or student.head_dim > teacher.head_dim:
        return {"attention": picker.axis("attention", teacher_size, student_size)}
    heads = picker.indices("heads", teacher.num_heads, student.num_heads)
    channels = picker.indices("head", teacher.head_dim, student.head_dim)
    attention = (heads.unsqueeze(1) * teacher.head_dim + channels).flatten()
    return {
        "attention": Axis(teacher_size, attention),
        "head": Axis(teacher.head_dim, channels),
    }
