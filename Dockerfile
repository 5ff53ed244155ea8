# Dependencies and the project are installed in stages of their own; the last one holds Python and what runs.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS dependencies
# For CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_PYTHON=/opt/slicewise/bin/python
# The pip of the base image installs into it, so that none has to be taken out again.
RUN python3 -m venv --without-pip /opt/slicewise
COPY requirements.lock /
RUN python3 -m pip install --no-deps --extra-index-url ${TORCH_INDEX} $(grep ^torch== /requirements.lock) \
    && python3 -m pip install -r /requirements.lock

FROM dependencies AS project
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY loadtest ./loadtest
COPY models ./models
COPY service ./service
# The load generator is no part of the service, and needs packages that are not in the lock.
RUN python3 -m pip install --no-deps --no-build-isolation --prefix=/app . \
    && rm -r /app/bin/slicewise-load /app/lib/python3*/site-packages/loadtest

FROM dependencies AS runtime
# Tests, headers, build tools and commands of others. Licences stay: they lie in *.dist-info.
RUN cd /opt/slicewise/lib/python3*/site-packages \
    && rm -r onnx/backend/test torch/include torch/share torch/test \
        setuptools setuptools-* _distutils_hack distutils-precedence.pth \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && find . -path '*.dist-info' -prune -o -type d -name tests -prune -exec rm -r {} + \
    && find /opt/slicewise/bin -type f -delete

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title=slicewise org.opencontainers.image.licenses=Apache-2.0
# Numbers, because Kubernetes takes no name for proof of not being root.
RUN groupadd --system --gid 10001 slicewise \
    && useradd --system --uid 10001 --gid 10001 --no-create-home slicewise \
    && install -d -o slicewise -g slicewise /var/cache/slicewise
COPY --from=runtime /opt/slicewise /opt/slicewise
# A layer of its own: a change of code moves megabytes, not PyTorch.
COPY --from=project /app /opt/slicewise
# A folder called models/ in the working directory must not win over the installed package. ONNX Runtime
# would report its use to Microsoft, and mix warnings about its cache into the JSON log.
ENV PATH=/opt/slicewise/bin:$PATH PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    SLICEWISE_HOST=0.0.0.0 SLICEWISE_PORT=8000 SLICEWISE_LOG_FORMAT=json SLICEWISE_CACHE_DIR=/var/cache/slicewise
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"SLICEWISE_PORT\"]}/readyz', timeout=2)"]
STOPSIGNAL SIGTERM
CMD ["slicewise", "serve"]
