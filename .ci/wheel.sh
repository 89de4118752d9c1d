#!/usr/bin/env bash
# A source archive of this checkout, whole; a wheel built from that archive alone, installed elsewhere: it carries every
# level, its command starts, the best level runs.
# The Python given, by default the checkout's own, has what Rorqual needs: a line in a .pth lends it to the new one.
# Objects compiled before, in build/kernels, are used where their sources in the archive are the same to the byte.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
isolated=(--no-isolation) wheel_isolated=(--no-build-isolation)  # nothing is downloaded where setuptools is new enough
"$python" -c "from setuptools.command import bdist_wheel" 2>"$dir/why" || isolated=() wheel_isolated=()
"$python" -m build --sdist "${isolated[@]}" --outdir "$dir" . >"$dir/build.log" || { tail -40 "$dir/build.log"; exit 1; }
tar --extract --file "$dir"/rorqual-*.tar.gz --directory "$dir"
unpacked=$(echo "$dir"/rorqual-*/)
git ls-files src/rorqual setup.py pyproject.toml README.md LICENSE | sort >"$dir/tracked"
missing=$(cd "$unpacked" && find . -type f | sed 's|^\./||' | sort | comm -23 "$dir/tracked" -)
[ -z "$missing" ] || { echo "the source archive lacks $missing"; exit 1; }
mkdir -p build/kernels "$unpacked/build"
ln -s "$PWD/build/kernels" "$unpacked/build/kernels"
"$python" -m pip wheel "$unpacked" --quiet --no-deps "${wheel_isolated[@]}" --wheel-dir "$dir"
"$python" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-deps "$dir"/rorqual-*.whl
site='import sysconfig; print(sysconfig.get_path("purelib"))'
"$python" -c "$site" >"$("$dir/venv/bin/python" -c "$site")/lent.pth"
git ls-files src/rorqual | grep -v 'kernels/cpu/.*\.\(cpp\|h\)$' | sed 's|^src/||' | sort >"$dir/wanted"
cd "$dir"
unset PYTHONPATH
venv/bin/python - <<'PY'
import platform
import sys
import zipfile
from pathlib import Path

import torch

import rorqual
from rorqual.kernels import cpu

wheel = next(Path.cwd().glob("rorqual-*.whl"))
names = set(zipfile.ZipFile(wheel).namelist())
levels = ("portable", "avx2", "avx512") if platform.machine() == "x86_64" else ("portable",)
lacking = set(Path("wanted").read_text().split()) - names
lacking |= {f"rorqual/kernels/cpu/compiled_{level}.so" for level in levels} - names
assert not lacking, f"{wheel.name} lacks {sorted(lacking)}"
assert Path(rorqual.__file__).is_relative_to(sys.prefix), rorqual.__file__
best = {"AVX2": "avx2", "AVX512": "avx512"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
assert cpu.capability() == best, (cpu.capability(), best)
print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, level {best} of {', '.join(levels)}")
PY
venv/bin/rorqual --help >help
grep -q speedrun help
echo "the wheel: fine"
