# Triton without a GPU: the embedded server with its Python backend and ONNX Runtime, over a repository mounted at
# /models. The doctor goes first, a line for each reason: a model without any good version ends the container.
# Runs as any user id, with a read-only root file system, no capabilities, /tmp and /dev/shm writable (compose.yaml).
ARG BASE=debian:trixie-slim
FROM ${BASE} AS build
# Debian's packages are not pinned: a security update takes the old version off the mirrors, and the build would fail.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/serving
COPY pyproject.toml requirements.lock ./
ARG EXTRAS="serve cpu"
# The same as in the Makefile. Its files only: its numpy<2 is for a Python API that is not used here.
ARG TRITON_WHEEL=nvidia-pytriton==0.7.0
RUN python3 -m venv /opt/serving/python \
    && /opt/serving/python/bin/python -c "import sys, tomllib; \
        project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = project['optional-dependencies']; \
        print(*project['dependencies'], *(line for extra in sys.argv[1:] for line in extras[extra]), sep='\n')" \
        ${EXTRAS} >requirements.txt \
    && python/bin/pip install --no-cache-dir --no-compile -r requirements.txt -c requirements.lock \
    && python/bin/pip install --no-cache-dir --no-compile --no-deps "${TRITON_WHEEL}" \
    && python/bin/pip uninstall --yes pip \
    && find python -path '*/python_backend_stubs/3.*' -prune ! -name "$(python3 -c \
        'import sys; print("{}.{}".format(*sys.version_info[:2]))')" -exec rm -r {} + \
    && rm requirements.txt requirements.lock pyproject.toml
# What serving/wakeup.py would build where it serves.
COPY serving/wakeup.c serving/
RUN cc -std=gnu11 -O2 -shared -fPIC -o serving/libwakeup.so serving/wakeup.c -ldl

FROM ${BASE}
# ca-certificates: whom serving.fetch trusts over https
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libpython3.13 python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/serving /opt/serving
WORKDIR /opt/serving
COPY deepseek/__init__.py deepseek/
COPY deepseek/spec deepseek/spec
COPY serving serving
COPY docker/server-cpu.sh docker/healthy.sh /usr/local/bin/
# COPY keeps modes, of a clone made under umask 077, too; its --chmod takes BuildKit.
RUN chmod -R a+rX deepseek serving /usr/local/bin/server-cpu.sh /usr/local/bin/healthy.sh
ENV PATH=/opt/serving/python/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp BUILD=/tmp/build
USER 10001:10001
EXPOSE 8000 8001 8002
# The first model may take minutes to load and warm up.
HEALTHCHECK --interval=5s --timeout=3s --start-period=300s --retries=3 CMD ["healthy.sh", "8000", "/v2/health/ready"]
ENTRYPOINT ["server-cpu.sh"]
