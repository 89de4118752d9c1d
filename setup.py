"""The compiled kernels (src/rorqual/kernels/cpu/build.py): an editable install compiles what this machine runs, a wheel
carries every level.

Without a C++ compiler the package installs all the same, and each function's PyTorch reference runs.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("src/rorqual/kernels/cpu")
sys.path.insert(0, str(FOLDER.resolve()))
import build  # noqa: E402


class Kernels(build_ext):
    def run(self) -> None:
        if self.inplace or self.editable_mode:
            build.build(build.HERE)
        else:
            build.build(self._target(), list(build.LEVELS))

    def _target(self) -> Path:
        return Path(self.build_lib).resolve().joinpath(*FOLDER.parts[1:])

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(path) for path in self._target().glob("compiled_*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in a checkout they are built in place


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # called by ctypes: the same for every Python


setup(
    cmdclass={"build_ext": Kernels, "bdist_wheel": Wheel},
    ext_modules=[  # makes the wheel platform-specific, and lists the sources for an sdist
        Extension(
            "rorqual.kernels.cpu.compiled",
            [str(path) for path in sorted(FOLDER.glob("csrc/*.cpp"))],
            depends=[str(path) for path in sorted(FOLDER.glob("csrc/**/*.h"))],
        )
    ],
)
