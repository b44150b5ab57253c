"""Package metadata. The folder `kernels/` is installed as `gmai_kernels`: a package under the bare
name would shadow another project's package that transformers probes for."""

from setuptools import find_packages, setup

KERNEL_PACKAGES = ["gmai_kernels", *(f"gmai_kernels.{name}" for name in find_packages("kernels"))]

setup(
    name="megatron-gmai",
    version="0.1.0",
    description="Train GMAI-VL, a medical vision-language model, with Megatron-Core 3D parallelism",
    license="Apache-2.0",
    python_requires=">=3.11",  # tested: 3.11, 3.12, 3.13
    packages=[*find_packages(include=["megatron_gmai", "megatron_gmai.*"]), *KERNEL_PACKAGES],
    package_dir={"gmai_kernels": "kernels"},
    package_data={
        "megatron_gmai.report": ["style.css"],
        "megatron_gmai.evaluate.server": ["page/*"],
    },
    # The lowest versions are those of requirements/lowest.txt, which `make test-lowest` tests.
    install_requires=[
        "torch>=2.10",  # the first with addmm(out_dtype=float32) into an fp32 matrix
        "triton>=3.6; platform_system == 'Linux'",  # which belongs to it
        "megatron-core>=0.16,<0.20",
        "sentencepiece>=0.2",
        "pillow>=11.3",
        "simplejpeg>=1.7.6",
        "webdataset>=1.0.2",
        "numpy>=1.26.4",
        "safetensors>=0.4.3",
        "psutil>=5.9.8",
        "tensorboard>=2.16.2",
    ],
    extras_require={
        # Compiled against the installed torch: pip needs --no-build-isolation (docs/gpu.md).
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12", "flash-attn>=2.7,<2.9"],
        "deep": ["imagecodecs>=2024.6.1"],
        "dicom": ["pydicom>=3", "imagecodecs>=2024.6.1"],
        "heic": ["pillow-heif>=0.21"],
        "nifti": ["nibabel>=5"],
        "parquet": ["pyarrow>=15"],
        "hf": ["transformers>=4.49"],
        "evaluate": ["openpyxl>=3.1"],
        "leakage": ["imagehash>=4.3"],
        "serve": ["starlette>=0.40", "uvicorn>=0.30"],
        "dev": ["pytest>=8", "ruff>=0.9", "mypy>=1.14", "pre-commit>=4", "transformers>=4.49"],
    },
)
