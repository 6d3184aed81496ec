"""Compilers of this machine, which torch needs to compile layers."""

import os
import shutil

C_COMPILER = "a C compiler (gcc or clang)"
CXX_COMPILER = "a C++ compiler (g++)"


def has_c_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


def has_cxx_compiler() -> bool:
    """Returns True if torch's inductor would find one."""
    return bool(os.environ.get("TORCH_INDUCTOR_INSTALL_GXX") or shutil.which(os.environ.get("CXX", "g++")))
