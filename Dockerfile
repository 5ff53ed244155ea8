# Two stages: wheels are built and installed in the first, the second holds Python and what runs.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# For CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/slicewise
WORKDIR /src
COPY requirements.lock ./
RUN /opt/slicewise/bin/pip install --no-deps --extra-index-url ${TORCH_INDEX} $(grep ^torch== requirements.lock) \
    && /opt/slicewise/bin/pip install -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY loadtest ./loadtest
COPY models ./models
COPY service ./service
RUN /opt/slicewise/bin/pip install --no-deps --no-build-isolation .

FROM ${PYTHON_IMAGE}
RUN useradd --system --uid 10001 --no-create-home slicewise && install -d -o slicewise /var/cache/slicewise
COPY --from=build /opt/slicewise /opt/slicewise
# A folder called models/ in the working directory must not win over the installed package. ONNX Runtime
# would report its use to Microsoft, and mix warnings about its cache into the JSON log.
ENV PATH=/opt/slicewise/bin:$PATH PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    SLICEWISE_HOST=0.0.0.0 SLICEWISE_PORT=8000 SLICEWISE_LOG_FORMAT=json SLICEWISE_CACHE_DIR=/var/cache/slicewise
USER slicewise
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"SLICEWISE_PORT\"]}/readyz', timeout=2)"]
STOPSIGNAL SIGTERM
CMD ["slicewise", "serve"]
