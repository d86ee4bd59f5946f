# Nodes with AMD GPUs (MI300X ...):   docker build -f cluster/images/rocm.Dockerfile -t REGISTRY/roma-ray:rocm .
#
# As cuda.Dockerfile, from the same constraints, but with torch's ROCm build and without FAISS, which has none: torch
# searches for neighbors then, to the same answer. The machine brings the amdgpu driver (/dev/kfd, /dev/dri).
FROM python:3.12-slim-bookworm

RUN apt-get update && apt-get install -y --no-install-recommends rsync openssh-client wget libdrm-amdgpu1 libnuma1 && rm -rf /var/lib/apt/lists/*

# ROCm's libraries come with this build of torch; another release of ROCm has another index.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/rocm7.1
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH"

WORKDIR /opt/roma-ray
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY roma_ray ./roma_ray
COPY jobs ./jobs
COPY configs ./configs
RUN pip install --no-cache-dir --constraint constraints.txt '.[minilm,hub,objects]'

RUN useradd --create-home --uid 1000 ray && chown -R ray /opt/roma-ray
USER ray
ENV RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
