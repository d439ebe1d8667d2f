"""Installs longnet_jax: `pip install -e .`, extras in brackets."""

import pathlib
import re

import setuptools

_VERSION = pathlib.Path(__file__).parent / "longnet_jax" / "version.py"

setuptools.setup(
  name="longnet-jax",
  version=re.search(r'"(\d[^"]*)"', _VERSION.read_text())[1],
  description="LongNet (arXiv 2307.02486) in JAX: exact dilated attention",
  license="Apache-2.0",
  packages=setuptools.find_packages(
    include=["longnet_jax*", "experiments*", "configs*"]
  ),
  # An editable install is then this folder on the path, found also from above a
  # clone named longnet_jax, which would be taken for a package without files.
  package_dir={"": "."},
  python_requires=">=3.11",
  classifiers=[
    f"Programming Language :: Python :: {version}"
    for version in ("3.11", "3.12", "3.13")
  ],
  install_requires=[
    "absl-py>=2.1",
    "array-record>=0.8",
    "etils[epath]>=1.12",
    "flax>=0.12",
    "grain>=0.2.10",
    "importlib_resources>=6.0",  # tfds imports it without declaring it
    "jax>=0.10",
    "jaxtyping>=0.3",
    "matplotlib>=3.8",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.12.0",
    "tensorflow-datasets>=4.9.9",
    "safetensors>=0.4",
    "tokenizers>=0.20",
    "tqdm>=4.66",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda13]>=0.10"],
    "gcs": ["gcsfs>=2024.2"],
    "s3": ["s3fs>=2024.2"],
    "tensorboard": ["tensorboardX>=2.6"],
    "notebook": ["jupyterlab>=4.0"],
    "test": [
      "beartype>=0.19",
      "flatbuffers>=24.3",
      "gcp-storage-emulator>=2024.8",
      "gcsfs>=2024.2",
      "hypothesis>=6.100",
      "pytest>=8.0",
      "pytest-xdist>=3.5",
      "ruff>=0.8",
    ],
  },
)
