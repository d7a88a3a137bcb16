# lora-accel in a container. Built and run on CPUs with buildah and a Debian 12 base of mmdebstrap, as no image registry
# could be reached: with the base below, and for GPUs, it was not built. tests/test_dockerfile.py compares its commands
# with pyproject.toml.
#
#   docker build -t lora-accel .
#   docker run --rm -v "$PWD:/work" lora-accel train --config recipes/my_rows.yaml
#
# PyPI's torch for Linux contains the CUDA libraries, so the same image uses a GPU (docker run --gpus all). Only where
# DeepSpeed compiles extensions for the GPU, nvcc is needed:
#
#   docker build -t lora-accel:cuda --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 .
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# g++ and ninja compile DeepSpeed's extensions and torch.compile's kernels at run time.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Extras of pyproject.toml, separated by commas.
ARG EXTRAS=gguf
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN python3 -m venv /opt/lora-accel \
    && /opt/lora-accel/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

# Models, data caches and compiled extensions; mount a volume here to keep them.
ENV PATH=/opt/lora-accel/bin:$PATH HF_HOME=/cache/huggingface TORCH_EXTENSIONS_DIR=/cache/torch_extensions
RUN useradd --create-home trainer && mkdir -p /cache /work && chown trainer /cache /work
USER trainer
WORKDIR /work
ENTRYPOINT ["lora-accel"]
CMD ["--help"]
