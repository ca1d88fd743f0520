"""Drives CMake: the compiled module needs no torch to build, so `pip install -e .` works in an isolated build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds fastvdiff._C with CMake and Ninja. FASTVDIFF_CUDA=AUTO|ON|OFF and CMAKE_ARGS are passed on."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and leave the module where setuptools expects it."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        cuda = os.environ.get("FASTVDIFF_CUDA", "AUTO")
        if cuda not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"FASTVDIFF_CUDA: expected AUTO, ON or OFF, got {cuda!r}")
        # --fresh: in an isolated build the cached paths of ninja and pybind11 are gone the second time.
        configure = [
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTVDIFF_CUDA={cuda}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C", *jobs], check=True)


setup(
    ext_modules=[Extension("fastvdiff._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=[*find_packages(include=["fastvdiff", "fastvdiff.*"]), "fastvdiff.kernels"],
    package_dir={"fastvdiff": "fastvdiff", "fastvdiff.kernels": "kernels"},
    package_data={"fastvdiff": ["assets/*.toml", "assets/tiny/**/*", "py.typed"]},
)
