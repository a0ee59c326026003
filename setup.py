"""Builds xtg_kernels._C from csrc/ with ninja: one extension that holds the kernels for every ISA.

XTG_BUILD_CPP=0 installs without it (no compiler needed; everything runs on the reference backend).
XTG_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
CXX and CXXFLAGS are a compiler and flags of your own, the last to be said.

The extension needs the Python that it was built for (pybind11) and any torch from 2.10 on (stable ABI): a wheel is
tagged cp311-cp311-linux_x86_64 or the like, without the extension py3-none-any. Wheel and source archive know their
commit (xtrimogene/version.py).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
X86_FLAGS["avx512bf16"] = [*X86_FLAGS["avx512"], "-mavx512bf16"]
X86_FLAGS["amx"] = [*X86_FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
X86_FLAGS["x86"] = []


def sources() -> dict[str, list[str]]:
    """Source file -> its own compiler flags. x86 ISAs are left out on other machines: they run the portable kernels."""
    found = {
        str(path.relative_to(ROOT)): []
        for folder in ("csrc", "csrc/common", "csrc/cpu")
        for path in sorted((ROOT / folder).glob("*.cpp"))
    }
    isas = {"scalar": []} | (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {})
    return found | {f"csrc/cpu/isa/{name}.cpp": flags for name, flags in isas.items()}


class NinjaBuild(build_ext):
    """setuptools' build_ext with flags for each file and ninja as the runner."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise SystemExit(
                f"setup.py: {error}. The C++ kernels are built against the torch that is installed: pip install torch "
                "ninja pybind11 'setuptools>=77', then pip install --no-build-isolation . (or install without them: "
                "XTG_BUILD_CPP=0 pip install .)"
            ) from error

        compiler = os.environ.get("CXX", "g++")
        includes = [*include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
        flags = [
            "-std=c++17",
            "-O3",
            "-g0",
            "-fPIC",
            "-fvisibility=hidden",
            "-fno-math-errno",
            # Fused multiply-adds only where the kernels ask for one: the bits of a row must not depend on its tile.
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
            # GCC 12 warns of uninitialised values inside its own AVX-512 headers.
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
            # The stable ABI of torch 2.10, the oldest torch that the package accepts.
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            f'-DXTG_TORCH_VERSION=\\"{torch.__version__}\\"',
            f'-DXTG_COMPILER=\\"{self._compiler_version(compiler)}\\"',
        ]
        link = ["-shared", *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch", "-lpthread"]
        if os.environ.get("XTG_SANITIZE") == "1":
            sanitize = [
                "-O1",
                "-g",
                "-fno-omit-frame-pointer",
                "-fsanitize=address,undefined",
                "-fno-sanitize-recover=undefined",
            ]
            flags += sanitize
            link += sanitize
        flags += os.environ.get("CXXFLAGS", "").split()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f"cxx = {compiler}",
            "flags = " + " ".join([*flags, *(f"-isystem {_escape(path)}" for path in includes)]),
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags $isa -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx $in -o $out " + " ".join(link),
        ]
        objects = []
        for source, isa_flags in sources().items():
            objects.append(source.replace("/", "_") + ".o")
            lines += [
                f"build {objects[-1]}: compile {_escape(str(ROOT.resolve() / source))}",
                f"  isa = {' '.join(isa_flags)}",
            ]
        lines += [f"build {_escape(str(target))}: link {' '.join(objects)}", ""]
        (build / "build.ninja").write_text("\n".join(lines))
        command = [sys.executable, "-m", "ninja", "-C", str(build)]
        subprocess.run(command, check=True)

    @staticmethod
    def _compiler_version(compiler: str) -> str:
        try:
            version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"setup.py: the C++ compiler {compiler!r} cannot be run ({error}). Install one (Debian: g++), name "
                "another with CXX, or install without the C++ kernels: XTG_BUILD_CPP=0 pip install ."
            ) from error
        return f"{Path(compiler).name}-{version.strip()}"


class PythonBuild(build_py):
    """setuptools' build_py, with the commit, and without what an earlier build has left in build/lib."""

    def run(self) -> None:
        # All of build/lib goes into the wheel, modules too that the tree no longer has.
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            _write_commit(Path(self.build_lib))


class SourceArchive(sdist):
    """setuptools' sdist, with the commit: whoever builds from the archive has no git to ask."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        _write_commit(Path(base_dir))


def _write_commit(folder: Path) -> None:
    """Write xtrimogene/commit.txt below a folder, where the commit is known."""
    sys.path.insert(0, str(ROOT))
    from xtrimogene.version import commit

    found = commit()
    if found:
        (folder / "xtrimogene" / "commit.txt").write_text(f"{found}\n")


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


commands = {"build_py": PythonBuild, "build_ext": NinjaBuild, "sdist": SourceArchive}
# The list of sources is the builder's; setuptools wants one to be there and puts them into the source archive.
with_kernels = os.environ.get("XTG_BUILD_CPP", "1") != "0"
setup(ext_modules=[Extension("xtg_kernels._C", list(sources()))] if with_kernels else [], cmdclass=commands)
