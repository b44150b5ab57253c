"""Package metadata. The folder `kernels/` is installed as `gmai_kernels`: a package under the bare
name would shadow another project's package that transformers probes for."""

from setuptools import find_packages, setup

KERNEL_PACKAGES = ["gmai_kernels", *(f"gmai_kernels.{name}" for name in find_packages("kernels"))]

setup(
    name="megatron-gmai",
    version="0.1.0",
    description="Train GMAI-VL, a medical vision-language model, with Megatron-Core 3D parallelism",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["megatron_gmai", "megatron_gmai.*"]), *KERNEL_PACKAGES],
    package_dir={"gmai_kernels": "kernels"},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16,<0.20",
        "triton>=3.2; platform_system == 'Linux'",
        "sentencepiece>=0.2",
        "pillow>=10",
        "simplejpeg>=1.7",
        "webdataset>=1.0",
        "numpy>=1.26",
        "safetensors>=0.4",
        "psutil>=5.9",
        "tensorboard>=2.16",
    ],
    extras_require={
        # Apex is built from its sources on the machine itself; it is used when it is there.
        "gpu": ["transformer-engine[pytorch]>=2.9", "flash-attn>=2.7,<2.9"],
        "dicom": ["pydicom>=3"],
        "parquet": ["pyarrow>=15"],
        "hf": ["transformers>=4.49"],
        "dev": ["pytest>=8", "ruff>=0.9", "mypy>=1.14", "pre-commit>=4", "transformers>=4.49"],
    },
)
