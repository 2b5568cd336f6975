# Triton on a GPU: NVIDIA's container of the tag in which the engines were built, the doctor, and ONNX Runtime for models of
# the Python backend. The doctor goes first: a repository that does not fit ends the container with a line for each reason.
# Runs as any user id, with a read-only root file system, no capabilities, /tmp and /dev/shm writable (compose.yaml).
ARG TRITON_TAG=26.10
# Another base to try this file with, where nvcr.io cannot be reached.
ARG BASE=nvcr.io/nvidia/tritonserver:${TRITON_TAG}-py3
# A glibc of 2.34 or newer is enough for what is compiled there.
ARG COMPILER=debian:trixie-slim
FROM ${COMPILER} AS build
# Debian's packages are not pinned: a security update takes the old version off the mirrors, and the build would fail.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY serving/wakeup.c ./
RUN cc -std=gnu11 -O2 -shared -fPIC -o libwakeup.so wakeup.c -ldl

FROM ${BASE}
ARG TRITON_TAG

WORKDIR /opt/serving
COPY pyproject.toml requirements.lock ./
# The system's Python is the one that Triton's Python backend runs; what it has of its own (TensorRT's bindings) stays seen.
ARG EXTRAS="serve gpu"
RUN python3 -m venv --system-site-packages --without-pip python \
    && python/bin/python -c "import sys, tomllib; \
        project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = project['optional-dependencies']; \
        print(*project['dependencies'], *(line for extra in sys.argv[1:] for line in extras[extra]), sep='\n')" \
        ${EXTRAS} >requirements.txt \
    && PIP_CONSTRAINT='' python/bin/python -m pip install --no-cache-dir --no-compile -r requirements.txt \
        -c requirements.lock \
    && rm requirements.txt requirements.lock pyproject.toml

COPY deepseek/__init__.py deepseek/
COPY deepseek/spec deepseek/spec
COPY serving serving
COPY --from=build /build/libwakeup.so serving/
COPY docker/server.sh docker/healthy.sh /usr/local/bin/
# COPY keeps modes, of a clone made under umask 077, too; its --chmod takes BuildKit.
RUN chmod -R a+rX deepseek serving /usr/local/bin/server.sh /usr/local/bin/healthy.sh
ENV PATH=/opt/serving/python/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp BUILD=/tmp/build TRITON_TAG=${TRITON_TAG}
USER 10001:10001
EXPOSE 8000 8001 8002
# The first engine may take minutes to load and warm up.
HEALTHCHECK --interval=5s --timeout=3s --start-period=300s --retries=3 CMD ["healthy.sh", "8000", "/v2/health/ready"]
ENTRYPOINT ["server.sh"]
