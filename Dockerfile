# Three images from one file: `gateway` (no model runtime), `worker` (PyTorch and Transformers) and
# `worker-vllm` (vLLM for NVIDIA GPUs).
#   docker build --target worker --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .

ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

FROM base AS build-gateway
RUN python -m venv /opt/venv
WORKDIR /build
COPY requirements/ requirements/
RUN pip install -r requirements/gateway.txt

FROM build-gateway AS build-worker
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install torch==2.13.0 --index-url ${TORCH_INDEX}
RUN pip install torch==2.13.0 -r requirements/gateway.txt -r requirements/workers.txt -r requirements/models.txt

FROM build-gateway AS build-worker-vllm
RUN pip install -r requirements/gateway.txt -r requirements/workers.txt -r requirements/vllm-gpu.txt

FROM base AS app
RUN useradd --system --uid 10001 --home-dir /tmp switchyard \
    && install -d -o switchyard -g switchyard /models /cache
WORKDIR /app
ENV HOME=/tmp \
    SWITCHYARD_HOME=/tmp/switchyard \
    SWITCHYARD_MODELS_DIR=/models \
    HF_HOME=/models/.hub \
    XDG_CACHE_HOME=/cache \
    VLLM_CACHE_ROOT=/cache/vllm \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor

FROM app AS gateway
COPY --from=build-gateway /opt/venv /opt/venv
COPY . .
RUN pip install --no-deps --no-build-isolation -e .
USER switchyard
EXPOSE 8080
CMD ["python", "-m", "api.server"]

FROM app AS worker
COPY --from=build-worker /opt/venv /opt/venv
COPY . .
RUN pip install --no-deps --no-build-isolation -e .
USER switchyard

# vLLM compiles kernels when it starts, so it needs a compiler at run time.
FROM app AS worker-vllm
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build-worker-vllm /opt/venv /opt/venv
COPY . .
RUN pip install --no-deps --no-build-isolation -e .
USER switchyard
