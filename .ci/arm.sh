#!/usr/bin/env bash
# The compiled kernels on ARM: cross-compiled and run by QEMU, called by the tests that run here (tests/proxy/proxy.py).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
TESTS=${*:-tests/kernels tests/engine/test_fused_cpu.py tests/engine/test_sampling.py}
CROSS=aarch64-linux-gnu-g++ QEMU="qemu-aarch64 -L /usr/aarch64-linux-gnu"

missing=
for tool in $CROSS qemu-aarch64 g++; do command -v $tool >/dev/null || missing+=" $tool"; done
if [ "$missing" ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "ARM: nothing was run for lack of$missing (Debian: g++-aarch64-linux-gnu, qemu-user, g++)"
        exit 0
    fi
    apt-get update -qq && apt-get install -y -qq g++-aarch64-linux-gnu qemu-user g++ >/dev/null
fi

OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
CXX=$CROSS "$PYTHON" - "$OUT" <<'PY'
import platform
import sys
from pathlib import Path

platform.machine = lambda: "aarch64"  # so that it is built as it would be there
sys.path.insert(0, "src/rorqual/kernels/cpu")
import build

build.OBJECTS = Path("build/arm").resolve()
sys.exit(build.build(Path(sys.argv[1]), ["portable"]) != ["portable"])
PY
$CROSS -std=c++20 -O2 -fopenmp tests/proxy/host.cpp -o "$OUT/host"
g++ -std=c++20 -O2 -shared -fPIC tests/proxy/heap.cpp -o "$OUT/heap.so"
echo "ARM: compiled in $SECONDS s; $(qemu-aarch64 --version | head -1) runs $TESTS"

# Deselected: tests that measure in a child process, which does not run the ARM kernels; huge pages, which shared memory
# lacks; tests that call no kernel; and most sizes of one long test.
WANTED="not peak_memory and not large_pages and not test_build and not test_dtypes and not test_levels and (not test_logits_are or 5-)"
# Two threads, so that barriers are tested; passive waiting, so that they do not spin on cores that QEMU needs.
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
RORQUAL_PROXY="$QEMU $OUT/host $OUT/compiled_portable.so" LD_PRELOAD="$OUT/heap.so" PYTHONPATH=src:tests/proxy \
    "$PYTHON" -m pytest -p proxy -p no:cacheprovider -k "$WANTED" $TESTS
