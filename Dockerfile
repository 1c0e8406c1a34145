# ddpm_ema in a container: train, score, report and export, on CPU or NVIDIA GPUs (the CUDA libraries come with torch's wheels).
#
#   docker build -t ddpm_ema .                      or: make image (a Docker engine, or buildah with a base made by debootstrap)
#   docker run --rm ddpm_ema                        checks itself: python -m ddpm_ema.doctor
#   docker run --rm --gpus all --shm-size 1g -v "$PWD/runs:/runs" ddpm_ema \
#       python -m ddpm_ema.launch --nproc-per-node gpu scripts/train.py --config configs/cifar10.yaml --output-dir /runs/cifar10
#
# Any Debian 12 image serves as base. Pin it by digest (name@sha256:…) where builds must not move.
ARG BASE_IMAGE=debian:bookworm-20250520-slim
FROM ${BASE_IMAGE}

# The compiler and Python's headers stay in the image: torch.compile and Triton build their kernels when training starts.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates=2023* \
        g++=4:12.2.* \
        python3=3.11.* \
        python3-dev=3.11.* \
        python3-venv=3.11.* \
        tini=0.19.* \
    && rm -rf /var/lib/apt/lists/*

# A fixed id, so that a mounted folder can be given to it. /cache and /runs are open to every user, because a cluster may set another id.
RUN groupadd --gid 10001 ddpm \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin ddpm \
    && install --directory --mode 1777 /cache /runs \
    && install --directory --mode 0755 /data

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /app

# Dependencies before code: this layer, some 6 GB and the slow one, is built again only when the list of dependencies changes.
# An empty package of the same name lets pip read them from pyproject.toml; it goes away in the same layer.
ARG EXTRAS=score,hub
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && mkdir ddpm_ema && touch ddpm_ema/__init__.py README.md LICENSE \
    && pip install --constraint constraints.txt setuptools \
    && pip install --constraint constraints.txt --no-build-isolation ".[${EXTRAS}]" \
    && pip uninstall --yes ddpm_ema \
    && rm -rf build ddpm_ema ddpm_ema.egg-info README.md LICENSE

# The code, owned by root: a run writes to /runs and /cache, never here. .dockerignore says what comes in.
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .

# Every cache in one writable place, to be mounted where compiled kernels and downloads should outlive the container.
ENV HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    XDG_CACHE_HOME=/cache \
    HF_HUB_DISABLE_TELEMETRY=1

# OFFLINE=1 at build time, or the first two variables at run time, for a machine without a network: nothing is looked up or sent.
ARG OFFLINE=0
ENV HF_HUB_OFFLINE=${OFFLINE} \
    HF_DATASETS_OFFLINE=${OFFLINE} \
    HF_UPDATE_DOWNLOAD_COUNTS=0

# The image checks itself as the user it will run as; a build that fails this is no image.
USER 10001:10001
RUN python -m ddpm_ema.doctor --output-dir /runs

# No HEALTHCHECK: a probe that opens the GPU could run training out of memory. Health is the exit code (0, 2, 3 or 75).
# tini reaps what data workers leave (-s: also where it is not process 1) and passes SIGTERM to the launcher, which has every rank save before it goes.
ENTRYPOINT ["/usr/bin/tini", "-s", "--"]
CMD ["python", "-m", "ddpm_ema.doctor", "--output-dir", "/runs"]
