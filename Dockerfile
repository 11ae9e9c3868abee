# The server with its bundled checkpoint:
#
#   docker build -t robuq-serve .
#   docker run -p 8000:8000 robuq-serve
#
# Settings are ROBUQ_* variables (`docker run robuq-serve robuq-serve --help`); another checkpoint:
#
#   docker run -p 8000:8000 -v /models:/models:ro -e ROBUQ_CHECKPOINT=/models/mine.safetensors robuq-serve
#
# Anyone who can reach the port can use the server, unless there are API keys (docs/serving.md). Mount their folder and
# not the file, or changes are not seen, and let user 10001 read it:
#
#   docker run -p 8000:8000 -v /srv/keys:/keys:ro -e ROBUQ_API_KEYS_FILE=/keys/keys.json robuq-serve
#
# It writes nothing: --read-only works. SIGTERM drains for up to 25 s, so stop it with `docker stop --time 30`, or set
# ROBUQ_DRAIN_TIMEOUT_S below the 10 s that docker allows by default.
#
# The image has torch's CPU build, about 1 GB in all. CUDA variant, several GB: the full Python image has the C compiler
# that run-time kernels need. The host needs NVIDIA's container toolkit.
#
#   docker build -t robuq-serve:cuda --build-arg TORCH=cuda --build-arg BASE_IMAGE=python:3.12 .
#   docker run --gpus all -p 8000:8000 --tmpfs /tmp:exec robuq-serve:cuda
#
# EXTRAS names optional dependencies of pyproject.toml, such as those of latent decoders and of the hub:
#
#   docker build -t robuq-serve --build-arg EXTRAS=vae,hub .
#
# A tag may move to another image, a digest cannot. Name the base by the digest that your registry gives for it:
#
#   docker buildx imagetools inspect python:3.12-slim --format '{{.Manifest.Digest}}'
#   docker build -t robuq-serve --build-arg BASE_IMAGE=python:3.12-slim@sha256:... .
#
# BASE_IMAGE may be any Debian or Ubuntu image that has Python 3.11 or later as `python`. docs/deployment.md has sizes
# and what is in which layer.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS builder
# The CPU kernels are C; the compiler stays behind in this stage. Python's own images have its headers, Debian's do not.
RUN headers=$(python -c "import os, sysconfig; print('' if os.path.exists(sysconfig.get_path('include') + '/Python.h') else 'python3-dev')") \
    && apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev ${headers} \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/robuq
ENV PATH=/opt/robuq/bin:$PATH
WORKDIR /src
# What changes least comes first. Every file is compared with its SHA-256, save that of torch's CPU build: its version is
# pinned and its index is PyTorch's own or TORCH_INDEX_URL. torch is nearly all of the image; its own tests are 80 MB.
ARG TORCH=cpu
ARG TORCH_INDEX_URL=
COPY constraints.txt requirements.lock requirements-cuda.lock ./
RUN pip install --no-deps --require-hashes --requirement requirements.lock
COPY scripts/install-torch.sh scripts/
RUN if [ "${TORCH}" = cuda ]; then pip install --no-deps --require-hashes --requirement requirements-cuda.lock; fi \
    && scripts/install-torch.sh python \
    && rm -rf /opt/robuq/lib/python3*/site-packages/torch/test
# Then extras by name, at the versions of constraints.txt.
ARG EXTRAS=
COPY pyproject.toml ./
RUN python -c "import os, tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*sum((extras[name] for name in os.environ.get('EXTRAS', '').split(',') if name), []), sep='\n')" > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt
# The project itself lies apart, so that a change of it is a layer of a few MB.
COPY setup.py README.md LICENSE THIRD_PARTY.md ./
COPY robuq_core robuq_core
COPY server server
COPY train train
RUN pip install --no-deps --no-build-isolation --target /opt/app .
ENV PYTHONPATH=/opt/app
# Fail here rather than fall back to the slow reference kernels in production.
WORKDIR /
RUN python -c "from robuq_core.kernels.cpu import load_library; load_library()"

FROM ${BASE_IMAGE} AS runtime
COPY --from=builder /opt/robuq /opt/robuq
COPY --from=builder /opt/app /opt/app
ENV PATH=/opt/app/bin:/opt/robuq/bin:$PATH \
    PYTHONPATH=/opt/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    TRITON_CACHE_DIR=/tmp/triton
# A number, so that Kubernetes can verify that it is not root. No shell, no home but /tmp for caches, nothing to write.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
# Unhealthy asks for a restart, so it is not /ready: a server that loads or drains is healthy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:%s/health' % os.environ.get('ROBUQ_PORT', 8000), timeout=4)"]
CMD ["robuq-serve", "--host", "0.0.0.0"]
