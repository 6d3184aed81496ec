"""Tools of this machine with which torch, Triton and vLLM compile kernels.

``requirements/setup.sh`` imports the module before anything is installed.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

C_COMPILER = "a C compiler (gcc or clang)"
CXX_COMPILER = "a C++ compiler (g++)"


def missing_tools(*, cxx: bool = False) -> str | None:
    """Returns what this machine lacks to compile kernels, with the cure; None if it lacks nothing.

    Triton compiles C for GPUs, inductor C++ for CPUs, both against Python's headers and when a first kernel runs.

    Args:
        cxx: of inductor for CPUs; else of Triton.
    """
    compiler, package = (CXX_COMPILER, "g++") if cxx else (C_COMPILER, "gcc")
    found = has_cxx_compiler() if cxx else has_c_compiler()
    # Triton's scheme: Debian's own would name /usr/local.
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    lacking = {} if found else {compiler: package}
    if not header.is_file():
        lacking[str(header)] = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    if not lacking:
        return None
    other = "" if header.is_file() else ", or take a Python that brings its headers, as uv's and conda's do"
    return f"{' and '.join(lacking)} (apt-get install {' '.join(lacking.values())}{other})"


def has_c_compiler() -> bool:
    """Returns True if Triton would find one: $CC alone, if it is set."""
    return any(map(shutil.which, [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]))


def has_cxx_compiler() -> bool:
    """Returns True if torch's inductor would find one."""
    return bool(os.environ.get("TORCH_INDUCTOR_INSTALL_GXX") or shutil.which(os.environ.get("CXX", "g++")))
