"""Builds the null card's libraries, and the environment of a process that sees it."""

import os
import re
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent / "lib"
CUDA = TORCH.parents[1] / "nvidia/cu13/include"
_FUNCTION = re.compile(r"^(?!static)[\w *]+?\b(\w+)\(", re.MULTILINE)


def build(folder: Path) -> None:
    """Compiles the libraries; functions without an effect are taken from what torch asks for and CUDA declares."""
    asked = {name for library in TORCH.glob("lib*cuda*.so") for name in _undefined(library)}
    asked |= _undefined(TORCH / "libtorch_python.so")
    declared = (CUDA / "cuda.h").read_text()
    driver = set(re.findall(r"CUresult CUDAAPI (cu\w+)\(", declared))
    driver |= {name for pair in re.findall(r"#\s*define\s+(cu\w+)\s+(cu\w+_v\d\w*)", declared) for name in pair}
    runtime = {name for name in asked if re.match("cuda[A-Z]|cublas|nccl", name)}
    _compile(folder / "libnullcard.so", "runtime.c", runtime)
    _compile(folder / "libcuda.so.1", "driver.c", driver)
    _compile(folder / "libnvidia-ml.so.1", "management.c", set())


def environment(folder: Path, *, capability: int) -> dict[str, str]:
    """Returns the variables of a process with one null card; ``capability`` is its compute capability times 10."""
    return os.environ | {
        "LD_PRELOAD": str(folder / "libnullcard.so"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "NULL_CARD_CAPABILITY": str(capability),
    }


def _undefined(library: Path) -> set[str]:
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}


def _compile(library: Path, source: str, names: set[str]) -> None:
    without_effect = sorted(names - set(_FUNCTION.findall((HERE / source).read_text())))
    others = library.with_name(f"others_of_{source}")
    others.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in without_effect))
    options = ["-w", "-O1", "-shared", "-fPIC", f"-I{CUDA}", f"-Wl,-soname,{library.name}"]
    subprocess.run(["gcc", *options, "-o", library, HERE / source, others, "-ldl"], check=True)
    if library.name.endswith(".1"):
        link = library.with_suffix("")
        link.unlink(missing_ok=True)
        link.symlink_to(library.name)
