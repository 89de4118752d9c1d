"""What results are kept under: a class of processors, so that no machine's figures end up in place of another's."""

import re
from pathlib import Path

import torch

from rorqual.kernels import cpu
from rorqual.plan.hardware import describe_machine

# Processors by vendor and family, and first and last model: what vendors call their generations.
GENERATIONS = {
    ("AuthenticAMD", 23): [("zen", 0x00, 0x2F), ("zen2", 0x30, 0xFF)],
    ("AuthenticAMD", 25): [
        ("zen3", 0x00, 0x0F), ("zen4", 0x10, 0x1F), ("zen3", 0x20, 0x5F), ("zen4", 0x60, 0xAF),
    ],
    ("AuthenticAMD", 26): [("zen5", 0x00, 0xFF)],
    ("GenuineIntel", 6): [
        ("broadwell", 0x4F, 0x4F), ("skylake", 0x55, 0x55), ("icelake", 0x6A, 0x6C), ("sapphirerapids", 0x8F, 0x8F),
        ("graniterapids", 0xAD, 0xAE), ("emeraldrapids", 0xCF, 0xCF),
    ],
    ("0x41", 8): [
        ("neoverse-n1", 0xD0C, 0xD0C), ("neoverse-v1", 0xD40, 0xD40), ("neoverse-n2", 0xD49, 0xD49),
        ("neoverse-v2", 0xD4F, 0xD4F), ("neoverse-v3", 0xD84, 0xD84), ("neoverse-n3", 0xD8E, 0xD8E),
    ],
}  # fmt: skip


def machine_class(device: str = "cpu") -> str:
    """The processor's generation and the instructions in use, such as zen4-avx512; of a GPU its name."""
    if device != "cpu":
        return _word(torch.cuda.get_device_name())
    instructions = "amx" if cpu.has_matrix_unit() else cpu.capability() or "reference"
    return f"{_generation()}-{_word(instructions)}"


def instruction_class() -> str:
    """The highest of processor.py's classes that the compiled kernels use here."""
    if cpu.has_matrix_unit():
        return "amx"
    if cpu.has_dot_products():
        return "avx512-bf16"
    return "avx512-vnni" if cpu.has_byte_products() else cpu.capability() or "none"


def _generation() -> str:
    fields = _cpuinfo()
    try:
        vendor = fields.get("vendor_id") or fields["CPU implementer"]
        family = int(fields.get("cpu family") or fields["CPU architecture"], 0)
        model = int(fields.get("model") or fields["CPU part"], 0)
    except (KeyError, ValueError):
        return _word(describe_machine()["processor"])
    for name, first, last in GENERATIONS.get((vendor, family), []):
        if first <= model <= last:
            return name
    return _word(f"{vendor} {family} {model}")


def _cpuinfo() -> dict[str, str]:
    """Of the first processor; empty where the system has no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
