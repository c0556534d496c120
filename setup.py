"""Package metadata; `constraints.txt` pins what the project is tested with."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="tensorlink",
    version="0.1.0",
    description="Train PyTorch models on the GPUs of people who do not know each other, where bad work is found out.",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["smartnodes_core", "smartnodes_core.*", "tensorlink", "tensorlink.*"]),
    package_data={
        "smartnodes_core": ["py.typed", "chain/artifacts/*.json"],
        "tensorlink": ["py.typed"],
    },
    install_requires=[
        "torch>=2.9",
        "web3>=8,<9",
        "py-evm>=0.12.1b1",
        "coincurve>=21",
        "pycryptodome>=3.20",
        "requests>=2.31",
        "eth-abi>=5",
        "pynacl>=1.6",
        "pyOpenSSL>=26",
        "cryptography>=47",
        "numpy>=2",
        "msgpack>=1.1",
        "msgspec>=0.20",
        "blake3>=1.0",
        "safetensors>=0.6",
        "tqdm>=4.66",
        "tbb>=2022; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "matplotlib>=3.9",
        "miniupnpc>=2.2",
        "prometheus-client>=0.21",
    ],
    extras_require={
        "dev": [
            "pytest>=9",
            "pytest-cov",
            "pytest-timeout",
            "pytest-xdist>=3.6",
            "hypothesis>=6.150",
            "ruff",
            "mypy",
            "types-tqdm",
            "types-requests",
            "psutil",
            "transformers>=5",
            "z3-solver",
        ],
        "fuzz": ["atheris>=2.3; python_version < '3.12'"],
    },
    entry_points={
        "console_scripts": [
            "tensorlink = tensorlink.cli.main:main",
            "tensorlink-worker = tensorlink.cli.worker:main",
            "tensorlink-validator = tensorlink.cli.validator:main",
        ]
    },
)
