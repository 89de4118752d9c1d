#!/usr/bin/env bash
# A source archive of this checkout, whole; and a wheel, installed elsewhere: it carries every level, its command starts, the best level runs.
# The Python given, by default the checkout's own, has what Rorqual needs: a line in a .pth lends it to the new one.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
"$python" -m build --sdist --outdir "$room" . >"$room/build.log" || { tail -40 "$room/build.log"; exit 1; }
tar --list --file "$room"/rorqual-*.tar.gz | sed 's|^[^/]*/||' | sort >"$room/packed"
missing=$(git ls-files src/rorqual setup.py pyproject.toml README.md | sort | comm -23 - "$room/packed")
[ -z "$missing" ] || { echo "the source archive lacks $missing"; exit 1; }
"$python" -m pip wheel . --quiet --no-deps --wheel-dir "$room"
"$python" -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --no-deps "$room"/rorqual-*.whl
site='import sysconfig; print(sysconfig.get_path("purelib"))'
"$python" -c "$site" >"$("$room/venv/bin/python" -c "$site")/lent.pth"
git ls-files src/rorqual | grep -v 'kernels/cpu/.*\.\(cpp\|h\)$' | sed 's|^src/||' | sort >"$room/wanted"
cd "$room"
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
