# Nodes with NVIDIA GPUs, and the head:   docker build -f cluster/images/cuda.Dockerfile -t REGISTRY/roma-ray:cuda .
#
# The CUDA libraries come with torch's own wheel; the machine brings the driver and the NVIDIA container toolkit.
FROM python:3.12-slim-bookworm

# rsync and ssh for `ray up`, wget for KubeRay's probes.
RUN apt-get update && apt-get install -y --no-install-recommends rsync openssh-client wget && rm -rf /var/lib/apt/lists/*

# PyPI's build of torch is the CUDA one; TORCH_INDEX names another (download.pytorch.org lists them).
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH"

WORKDIR /opt/roma-ray
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY roma_ray ./roma_ray
COPY jobs ./jobs
COPY configs ./configs
RUN pip install --no-cache-dir --constraint constraints.txt '.[minilm,faiss,hub,objects]'

RUN useradd --create-home --uid 1000 ray && chown -R ray /opt/roma-ray
USER ray
# Tokens are given to the container, never baked in; without one Ray then does not start.
ENV RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
