"""FP8 releases, rounded here by plain loops over blocks, and what they stand for."""

import json

import torch
from safetensors.torch import load_file, save_file

from rorqual import save_model

LINEARS = ("_proj.weight", "kv_a_proj_with_mqa.weight")


def to_fp8(weight, block=(128, 128), powers_of_two=False):
    """Block-scaled as in the release: (E4M3 weight, scales, what they stand for)."""
    scales = torch.empty([-(-n // b) for n, b in zip(weight.shape, block, strict=True)])
    quantised, plain = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale = weight[where].abs().max() / 448
            scales[i, j] = scale.log2().ceil().exp2() if powers_of_two else scale
            quantised[where] = (weight[where] / scales[i, j]).to(torch.float8_e4m3fn)
            plain[where] = quantised[where].float() * scales[i, j]
    return quantised, scales, plain


def in_fp8(name):
    """Whether DeepSeek stores a tensor in FP8."""
    return name.endswith(LINEARS) and not name.endswith("eh_proj.weight")


def write_release(model, path, scales="fp32", shards=3):
    """`model` as an FP8 release of several shards, its scales in other shards than its weights.

    scales: "fp32", "ue8m0" (powers of two in FP32) or "e8m0" (in a byte). → what its tensors stand for, in FP32.
    """
    save_model(model.bfloat16(), path)
    tensors, stored = load_file(path / "model.safetensors"), {}
    (path / "model.safetensors").unlink()
    plain = {name: t.float() for name, t in tensors.items()}
    for name, tensor in tensors.items():
        stored[name] = tensor
        if in_fp8(name):
            stored[name], scale, plain[name] = to_fp8(tensor.float(), powers_of_two=scales != "fp32")
            stored[name + "_scale_inv"] = scale.to(torch.float8_e8m0fnu) if scales == "e8m0" else scale
    for name in [name for name in stored if "correction" in name]:
        stored[name] = stored[name].float()
    places = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(stored)}
    for file in set(places.values()):
        save_file({n: t.contiguous() for n, t in stored.items() if places[n] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = json.loads((path / "config.json").read_text())
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    quantization |= {} if scales == "fp32" else {"scale_fmt": "ue8m0"}
    config["quantization_config"] = quantization | {"weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config))
    return plain


def stored_bytes(path):
    """Every tensor of a directory: name → dtype, shape, bytes."""
    found = {}
    for file in path.glob("*.safetensors"):
        for name, t in load_file(file).items():
            found[name] = t.dtype, t.shape, bytes(t.flatten().view(torch.uint8).numpy())
    return found
