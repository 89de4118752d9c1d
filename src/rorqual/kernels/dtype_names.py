"""The names of dtypes: in recipes and options, in safetensors files, and of compiled functions."""

import torch

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # that a model can run in, besides "auto"
KERNEL_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}  # of C++ functions (cpu/csrc/dtypes.h)
SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_CODES = {dtype: code for code, dtype in SAFETENSORS.items()}
