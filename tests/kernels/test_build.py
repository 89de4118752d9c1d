"""The compiled functions are made once, as far as they can be; what cannot is told in one sentence. A script stands for
the compiler."""

import re
import shutil
import subprocess
from dataclasses import fields

import pytest

from rorqual.kernels import append_tokens, fused_decode, quantized_linear
from rorqual.kernels.cpu import bindings, build

SCRIPT = """#!/bin/sh
echo "$@" >> {log}
case "$*" in *{bad}*) echo "x.cpp:1: error: no such thing" >&2; exit 1;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Calls it with what makes it fail, and gets the sources that were compiled since."""
    log, script = tmp_path / "log", tmp_path / "cxx"
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(build, "OBJECTS", tmp_path / "objects")
    here = tmp_path / "here"
    shutil.copytree(build.HERE, here, ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(build, "HERE", here)

    def run(levels, bad="nothing-of-it"):
        log.write_text("")
        script.write_text(SCRIPT.format(log=log, bad=bad))
        script.chmod(0o755)
        built = build.build(tmp_path / "out", levels)
        lines = [line.split() for line in log.read_text().splitlines()]
        return built, sorted(line[line.index("-c") + 1].rpartition("/")[2] for line in lines if "-c" in line)

    return run


def test_nothing_is_compiled_twice(compiler, tmp_path):
    names = [
        "adamw", "best_scale", "bf16_gemm", "block_scaled", "elementwise", "exact_attention", "exact_gemm",
        "exact_rows", "f32_gemm", "fused_decode", "masked_attention", "paged_attention", "qgemm", "sampling",
    ]  # fmt: skip
    sources = [f"{name}.cpp" for name in names]
    csrc = build.HERE / "csrc"
    assert sorted(path.name for path in csrc.glob("*.cpp")) == sources
    assert compiler(["portable"]) == (["portable"], sources)
    assert compiler(["portable"]) == (["portable"], [])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compiled_portable.so"]
    with open(csrc / "elementwise.cpp", "a") as file:
        file.write("\n")
    assert compiler(["portable"])[1] == ["elementwise.cpp"]
    with open(csrc / "microkernel.h", "a") as file:
        file.write("\n")
    assert compiler(["portable"])[1] == ["qgemm.cpp"]
    with open(csrc / "fused_decode" / "moe.h", "a") as file:
        file.write("\n")
    assert compiler(["portable"])[1] == ["fused_decode.cpp"]
    (csrc / "dtypes.h").write_text("")
    assert compiler(["portable"])[1] == sources
    assert len(list(build.OBJECTS.iterdir())) == len(sources)


def test_what_failed_is_told_and_the_rest_is_built(compiler, tmp_path, capsys):
    levels = list(build.LEVELS)
    built, _ = compiler(levels, bad="elementwise.cpp")
    assert built == []
    said = [line for line in capsys.readouterr().out.splitlines() if "fail" in line]
    assert len(said) == 1
    assert "x.cpp:1: error: no such thing" in said[0]
    assert "plain PyTorch" in said[0]
    assert not list(tmp_path.glob("out/*"))
    if "avx512" in levels:
        built, _ = compiler(levels, bad="march=x86-64-v4")
        assert built == ["portable", "avx2"]
        said = capsys.readouterr().out
        assert "avx512: " in said
        assert "plain PyTorch" not in said


def test_no_compiler_is_no_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.build(tmp_path) == []
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "no C++ compiler" in said
    assert "install g++" in said


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_this_machine_gets_what_it_runs():
    levels = build.own_levels(["g++"])
    assert levels[-1] == "portable"
    assert set(levels) <= set(build.LEVELS)


def declared(file, kind):
    """The names that a C++ struct or enum declares, in order."""
    source = re.sub(r"//.*", "", (build.HERE / "csrc" / file).read_text())
    parts = re.split("[;,]", re.search(rf"\b{kind} {{(.*?)}}", source, re.DOTALL)[1])
    return [re.findall(r"\w+", part)[-1] for part in parts if part.strip()]


def test_tables_are_the_same_in_cpp():
    assert f"INTERFACE = {bindings.INTERFACE};" in (build.HERE / "csrc" / "dtypes.h").read_text()
    for enum, names in (
        ("BatchNumber", append_tokens.NUMBERS),
        ("FilterColumn", append_tokens.FILTER_COLUMNS),
    ):
        assert declared("sampling.cpp", f"enum {enum}") == [name.upper() for name in names]
    assert declared("quantized_rows.h", "enum Format") == [name.upper() for name in quantized_linear.FORMATS]
    model = "fused_decode/model.h"
    assert declared(model, "struct Layer") == [f.name for f in fields(fused_decode.LayerWeights)]
    sizes = [f.name for f in fields(fused_decode.ModelSizes)]
    assert declared(model, "struct Network")[2 : 2 + len(sizes)] == sizes


def exported():
    """Of each exported function, the types of its parameters, once for every definition."""
    found = []
    for path in sorted((build.HERE / "csrc").glob("*.cpp")):
        source = path.read_text().replace("\\\n", "")
        both = re.findall(r"#define PARAMETERS\(T\)\s*\(([^)]*)\)\s*EXPORT_F32_BF16\(void, (\w+),", source)
        one = re.findall(r"void (\w+)_(?:f32|bf16)\(([^)]*)\)", source)
        for name, parameters in [(name, parameters) for parameters, name in both] + one:
            types = [re.match(r"\s*(?:const )?([\w<>]+ ?\*?)", p)[1].strip() for p in parameters.split(",")]
            found.append((name, types))
    return found


def test_arguments_are_those_of_cpp():
    """One too many or too few, or a number where C++ takes an address, would corrupt memory."""
    pointers = {bindings.F32: "float *", bindings.I32: "int32_t *", bindings.U8: "uint8_t *", bindings.BOOL: "bool *"}
    wanted = {kind: {name} for kind, name in pointers.items()} | {
        bindings.INT: {"i64"},
        bindings.FLOAT: {"float"},
        bindings.T: {"T *", "float *", "bf16 *"},
        bindings.I64: {"i64 *", "Network<T> *"},
    }
    wanted[bindings.F32].add("Scalars *")
    assert {name for name, _ in exported()} == set(bindings.SIGNATURES)
    for name, types in exported():
        kinds = bindings.SIGNATURES[name]
        assert len(types) == len(kinds), name
        for i, (kind, type_) in enumerate(zip(kinds, types, strict=True)):
            assert type_ in wanted[kind], f"{name}, argument {i}"


@pytest.mark.skipif(not build.X86, reason="levels of x86")
@pytest.mark.parametrize("name", build.SOURCES)
def test_every_source_is_valid_at_the_highest_level(name):
    """Also where the processor lacks it, so that nothing else would compile it."""
    try:
        compiler = build.find_compiler()
    except build.Failed as e:
        pytest.skip(str(e))
    command = [*compiler, *build._flags("avx512", name), "-O0", "-fsyntax-only", str(build._source(name))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
