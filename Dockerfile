# The whole pipeline as an image, for CPUs or for NVIDIA GPUs. The checkout is /elsa, of user 1000.
#
#   docker build --target cpu -t elsa .
#   docker build --target cuda -t elsa --build-arg TORCH_CUDA_ARCH_LIST="9.0" .
#   docker run --rm -it --shm-size 2g elsa dvc repro report

FROM python:3.12-slim-bookworm AS tools-cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 elsa
WORKDIR /elsa
RUN chown elsa:elsa /elsa
USER elsa
ENV PATH="/elsa/.venv/bin:$PATH"

# Ubuntu 24.04's Python is 3.12. nvcc compiles mmcv's and our kernels without a GPU.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS tools-cuda
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && userdel --remove ubuntu && useradd --create-home --uid 1000 elsa
WORKDIR /elsa
RUN chown elsa:elsa /elsa
USER elsa
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX"
ENV PATH="/elsa/.venv/bin:$PATH" \
    CUDA_HOME=/usr/local/cuda FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$TORCH_CUDA_ARCH_LIST"

# The packages are a layer of their own, which a change of the code leaves as it is.
FROM tools-cpu AS cpu
COPY --chown=elsa:elsa Makefile pyproject.toml hatch_build.py README.md LICENSE .python-version ./
COPY --chown=elsa:elsa pipelines/cluster/keep_wheel.py pipelines/cluster/
RUN make setup && rm -rf ~/.cache
COPY --chown=elsa:elsa . .
RUN python -m ops.build --quiet
CMD ["elsa", "--help"]

FROM tools-cuda AS cuda
COPY --chown=elsa:elsa Makefile pyproject.toml hatch_build.py README.md LICENSE .python-version ./
COPY --chown=elsa:elsa pipelines/cluster/keep_wheel.py pipelines/cluster/
RUN make setup && rm -rf ~/.cache
COPY --chown=elsa:elsa . .
RUN python -m ops.build --quiet
CMD ["elsa", "--help"]
