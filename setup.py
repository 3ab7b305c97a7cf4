"""Packaging. The tools' settings are in pyproject.toml."""

import importlib.util
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
CSRC = HERE / "csrc"


def load_build():
    """The module fastadv.build, loaded by its path: importing fastadv would need torch."""
    spec = importlib.util.spec_from_file_location("fastadv_build", HERE / "fastadv" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def version():
    text = (HERE / "fastadv" / "__init__.py").read_text()
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)[1]


def ops():
    """The C++ ops as an extension where torch and a compiler are there, else nothing: they are built on first use.

    An isolated build has no torch, and is not made to fetch a second one.
    """
    if importlib.util.find_spec("torch") is None:
        return []
    build = load_build()
    try:
        build.find_compiler()
    except build.BuildError as error:
        print(f"fastadv: {error}; the C++ ops will be built on first use", file=sys.stderr)
        return []
    # The name only marks the wheel as one with compiled code: build_ext below names the file by its content.
    return [Extension("fastadv.csrc.fastadv_ops", sorted(str(p.relative_to(HERE)) for p in CSRC.glob("*.cpp")))]


class BuildOps(build_ext):
    """Compiles csrc/ with the code that also compiles it on first use."""

    def run(self):
        in_place = self.inplace or self.editable_mode
        folder = CSRC if in_place else Path(self.build_lib, "fastadv", "csrc")
        self.built = []
        if self.extensions:
            library = load_build().compile_library(CSRC, folder)
            self.built = [str(library)]
            # Of an earlier build in the same place: nothing would ever load them again.
            for stale in folder.glob("fastadv_ops-*.so"):
                if stale != library:
                    stale.unlink()

    def get_outputs(self):
        return self.built

    def get_output_mapping(self):
        return {}


setup(
    name="fastadv",
    version=version(),
    description="Fast, exact attacks and adversarial transfer learning for image classifiers, on PyTorch",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE*"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["fastadv", "fastadv.*"]), "fastadv.kernels", "fastadv.csrc"],
    package_dir={"fastadv.kernels": "kernels", "fastadv.csrc": "csrc"},
    package_data={
        "fastadv": ["py.typed", "weights/*", "templates/*"],
        "fastadv.csrc": ["*.cpp", "*.h", "README.md"],
    },
    ext_modules=ops(),
    cmdclass={"build_ext": BuildOps},
    # The library uses torch's stable ABI and none of Python's: one wheel for every Python from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0.20",
        "numpy>=2.0",
        "safetensors>=0.5",
        "tyro>=1.0.17",
        "rich>=13.7",
        "matplotlib>=3.9",
        "scikit-learn>=1.5",
        "pillow>=10.3",
        "jinja2>=3.1",
    ],
    extras_require={
        "test": ["pytest>=8.3", "pytest-benchmark>=5.1", "pytest-xdist>=3.6", "hypothesis>=6.100"],
        "dev": ["ruff>=0.12", "mypy>=1.15"],
        # What benchmarks/ compares with. For an environment of their own: they pin old versions of others.
        "bench": [
            "torchattacks>=3.5.1",
            "foolbox>=3.3.4",
            "adversarial-robustness-toolbox>=1.20",
            "cleverhans>=4.0",
            "pyautoattack>=0.2",
        ],
    },
)
