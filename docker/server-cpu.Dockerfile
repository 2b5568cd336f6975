# Triton without a GPU: the embedded server with its Python backend and ONNX Runtime, serving the repository at /models.
# It checks every version first: if a model has no intact one, the container ends and says why.
# Runs as any user id, with a read-only root file system, no capabilities, and writable /tmp and /dev/shm (compose.yaml).
ARG BASE=debian:trixie-slim
FROM ${BASE} AS build
# Debian's packages are not pinned: mirrors drop old versions after a security update, and the build would fail.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/serving
COPY pyproject.toml requirements.lock ./
COPY client/pyproject.toml client/
ARG EXTRAS="serve cpu openai"
# As in cli/environment.py. --no-deps: it asks for numpy<2 only for a Python API that is not used here.
ARG TRITON_WHEEL=nvidia-pytriton==0.7.0
RUN python3 -m venv /opt/serving/python \
    && /opt/serving/python/bin/python -c "import sys, tomllib; \
        project, client = (tomllib.load(open(path, 'rb'))['project'] for path in sys.argv[1:3]); \
        extras = project['optional-dependencies']; \
        print(*project['dependencies'], *client['dependencies'], \
            *(line for extra in sys.argv[3:] for line in extras[extra]), sep='\n')" pyproject.toml client/pyproject.toml \
        ${EXTRAS} >requirements.txt \
    && python/bin/pip install --no-cache-dir --no-compile -r requirements.txt -c requirements.lock \
    && python/bin/pip install --no-cache-dir --no-compile --no-deps "${TRITON_WHEEL}" \
    && python/bin/pip uninstall --yes pip \
    && find python -path '*/python_backend_stubs/3.*' -prune ! -name "$(python3 -c \
        'import sys; print("{}.{}".format(*sys.version_info[:2]))')" -exec rm -r {} + \
    && rm -r requirements.txt requirements.lock pyproject.toml client
# serving/embedded/preloaded_fixes.py would build this at the start; the image has no compiler.
COPY serving/embedded/preloaded_fixes.c serving/embedded/
RUN cc -std=gnu11 -O2 -shared -fPIC -o serving/embedded/libwakeup.so serving/embedded/preloaded_fixes.c -ldl

FROM ${BASE}
# ca-certificates: what deepseek fetch trusts over https
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libpython3.13 python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/serving /opt/serving
WORKDIR /opt/serving
COPY deepseek/__init__.py deepseek/onnxruntime_session.py deepseek/precisions.py deepseek/targets.py deepseek/
COPY deepseek/spec deepseek/spec
COPY client/deepseek_client deepseek_client
COPY cli cli
COPY serving serving
COPY docker/server-cpu.sh docker/healthy.sh /usr/local/bin/
# COPY keeps file modes, also those of a clone made with umask 077. COPY --chmod would need BuildKit.
RUN chmod -R a+rX cli deepseek deepseek_client serving /usr/local/bin/server-cpu.sh /usr/local/bin/healthy.sh
ENV PATH=/opt/serving/python/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp DEEPSEEK_BUILD=/tmp/build
USER 10001:10001
EXPOSE 8000 8001 8002 8003
# Loading and warm-up may take minutes.
HEALTHCHECK --interval=5s --timeout=3s --start-period=300s --retries=3 CMD ["healthy.sh", "8000", "/v2/health/ready"]
ENTRYPOINT ["server-cpu.sh"]
