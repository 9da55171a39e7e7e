# syntax=docker/dockerfile:1
# Two images from one file: `api` serves and carries no torch; `worker` adds the training side.
#
#   docker build --target api -t widthwise-api .
#   docker build --target worker --build-arg TORCH_INDEX_URL=<index of the CPU build> -t widthwise-worker .
#
# PyTorch's own install page names the index of its CPU build; without it torch brings gigabytes of CUDA libraries.

FROM python:3.13.16-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/widthwise/bin:$PATH

FROM base AS build-api
WORKDIR /src
RUN python -m venv /opt/widthwise
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY alembic alembic
COPY app app
COPY chains chains
RUN pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt ".[otel]"

FROM build-api AS build-worker
ARG TORCH_INDEX_URL=""
RUN pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt \
    ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} ".[otel,train]"

FROM base AS runtime
RUN groupadd --system --gid 10001 widthwise \
 && useradd --system --uid 10001 --gid widthwise --home-dir /var/lib/widthwise --create-home --shell /usr/sbin/nologin widthwise \
 && install --directory --owner=widthwise --group=widthwise /scratch
# /scratch may be lost at any time: spooled uploads, and the files of a job that runs here now.
ENV WIDTHWISE_DATA_DIR=/var/lib/widthwise \
    WIDTHWISE_WORK_DIR=/scratch/jobs \
    TMPDIR=/scratch
WORKDIR /var/lib/widthwise
VOLUME ["/var/lib/widthwise", "/scratch"]
USER 10001:10001

FROM runtime AS worker
COPY --from=build-worker /opt/widthwise /opt/widthwise
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 CMD ["widthwise", "worker-health"]
CMD ["widthwise", "worker"]

# The last stage is what a build without a target makes.
FROM runtime AS api
COPY --from=build-api /opt/widthwise /opt/widthwise
# Any address but loopback asks for API keys: set WIDTHWISE_ADMIN_KEY, or make the first key by `widthwise keys create`.
ENV WIDTHWISE_HOST=0.0.0.0 \
    WIDTHWISE_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=5 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=2)"]
CMD ["widthwise", "serve"]
