"""Everything is declared in pyproject.toml, except the native ops of csrc/, which are built here where they can be.

TIEDFUSED_BUILD_EXT  auto (default): whatever this machine can build, and if that is nothing the package is installed
                     without; cpu, cuda: build that, and fail if it cannot be done; 0: build nothing
TIEDFUSED_CUDA_ARCHS compute capabilities of the CUDA op, by default "80 90a"

torch has to be importable, so not under build isolation: `pip install --no-build-isolation .` or
`python setup.py build_ext --inplace`. What was built, or why nothing was, is left beside the shared object for
`tiedfused info` to show.
"""

import glob
import os
import pathlib
import shutil
import sys

from setuptools import setup

MODE = os.environ.get("TIEDFUSED_BUILD_EXT", "auto").lower()
TORCH_TARGET = "0x020b000000000000"  # the oldest torch that the shared object runs on: 2.11
BUILD_NOTE = "_native_build.txt"


def say(text: str) -> None:
    print(f"tiedfused: {text}", file=sys.stderr)


def cuda_home() -> str | None:
    """The toolkit's folder; the nvcc on PATH may be a script that lies elsewhere."""
    if home := os.environ.get("CUDA_HOME"):
        return home
    if os.path.isdir("/usr/local/cuda/include"):
        return "/usr/local/cuda"
    nvcc = shutil.which("nvcc")
    home = os.path.dirname(os.path.dirname(os.path.realpath(nvcc))) if nvcc else ""
    return home if os.path.isdir(os.path.join(home, "include")) else None


def native() -> dict:
    """The part of `setup`'s arguments that builds the native ops."""
    if MODE not in ("auto", "cpu", "cuda", "0"):
        raise SystemExit(f"TIEDFUSED_BUILD_EXT: got {MODE!r}; expected auto, cpu, cuda or 0")
    if MODE == "0":
        return {}
    home = cuda_home()
    if home is not None:
        os.environ["CUDA_HOME"] = home  # cpp_extension reads it when it is imported
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:  # a torch that is installed may lack libraries: OSError
        if MODE != "auto":
            raise SystemExit(f"TIEDFUSED_BUILD_EXT={MODE} needs torch: pip install --no-build-isolation .") from None
        why = "torch is not importable here" if isinstance(error, ImportError) else f"torch does not load: {error}"
        say(f"native ops not built: {why}; pip install --no-build-isolation builds them")
        return {}

    no_cuda = None
    if MODE == "cpu":
        no_cuda = "TIEDFUSED_BUILD_EXT is cpu"
    elif torch.version.cuda is None:
        no_cuda = "this PyTorch is not a CUDA build"
    elif home is None:
        no_cuda = "no CUDA toolkit was found"
    if MODE == "cuda" and no_cuda:
        raise SystemExit(f"TIEDFUSED_BUILD_EXT=cuda: {no_cuda}")

    flags = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags.append(f"-ffile-prefix-map={os.getcwd()}{os.sep}=")  # what the errors of the op name
    sources = ["csrc/bindings.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    depends = glob.glob("csrc/**/*.h", recursive=True)
    extensions = {}
    if no_cuda is None:
        archs = os.environ.get("TIEDFUSED_CUDA_ARCHS", "80 90a").split()
        extensions["CPU and CUDA"] = cpp_extension.CUDAExtension(
            "tiedfused._C",
            [*sources, "csrc/bindings_cuda.cpp", "csrc/cuda/few_rows.cu"],
            depends=depends,
            extra_compile_args={
                "cxx": [*flags, f"-DTIEDFUSED_CUDA_ARCHS={','.join(archs)}"],
                "nvcc": ["-O3", "-std=c++17", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)],
            },
            py_limited_api=True,
        )
    if MODE != "cuda":
        extensions["CPU"] = cpp_extension.CppExtension(
            "tiedfused._C", sources, depends=depends, extra_compile_args={"cxx": flags}, py_limited_api=True
        )

    class Build(cpp_extension.BuildExtension):
        """Builds the first extension that can be; in mode auto, none is fine too."""

        def get_export_symbols(self, ext):  # it is no Python module: torch.ops.load_library loads it
            return []

        def run(self):
            extensions_of = dict(zip(extensions, self.extensions, strict=True))
            built, why, inplace = None, no_cuda, self.inplace
            for name, extension in extensions_of.items():
                self.extensions = [extension]
                self.inplace = inplace  # a run that fails leaves it off
                try:
                    super().run()
                    built = name
                    break
                except Exception as error:  # torch and the compilers raise all sorts
                    if MODE != "auto":
                        raise
                    why = f"{name}: {type(error).__name__}: {error}".splitlines()[0]
            folders = [os.path.join(self.build_lib, "tiedfused"), *(["tiedfused"] if inplace else [])]
            if built is None:
                self.extensions = []
                for folder in map(pathlib.Path, folders):
                    for old in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
                        old.unlink()  # of other sources, or for another torch
            note = f"built for {built}" if built else "nothing built"
            note += f" ({why})" if why else ""
            say(f"native ops: {note}")
            for folder in map(pathlib.Path, folders):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / BUILD_NOTE).write_text(note + "\n")

    options = {"no_python_abi_suffix": True, "use_ninja": shutil.which("ninja") is not None}
    return {
        "ext_modules": list(extensions.values()),
        "cmdclass": {"build_ext": Build.with_options(**options)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())
