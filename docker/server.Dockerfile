# Triton on a GPU: NVIDIA's container with the tag that built the engines, the doctor, and ONNX Runtime for models of the
# Python backend. The doctor runs first: if the repository does not fit, the container ends with one line per reason.
# Runs as any user id, with a read-only root file system, no capabilities, and writable /tmp and /dev/shm (compose.yaml).
ARG TRITON_TAG=26.10
# Override to try this file without access to nvcr.io.
ARG BASE=nvcr.io/nvidia/tritonserver:${TRITON_TAG}-py3
FROM ${BASE}
ARG TRITON_TAG

# NVIDIA's value leads to the packages of its DALI backend, numpy among them, which would hide those installed below.
ENV PYTHONPATH=
WORKDIR /opt/serving
COPY pyproject.toml requirements.lock ./
COPY client/pyproject.toml client/
# Triton's Python backend runs the system's Python. Its own packages (TensorRT's bindings) stay visible.
ARG EXTRAS="serve gpu openai"
RUN python3 -m venv --system-site-packages --without-pip python \
    && python/bin/python -c "import sys, tomllib; \
        project, client = (tomllib.load(open(path, 'rb'))['project'] for path in sys.argv[1:3]); \
        extras = project['optional-dependencies']; \
        print(*project['dependencies'], *client['dependencies'], \
            *(line for extra in sys.argv[3:] for line in extras[extra]), sep='\n')" pyproject.toml client/pyproject.toml \
        ${EXTRAS} >requirements.txt \
    && PIP_CONSTRAINT='' python/bin/python -m pip install --no-cache-dir --no-compile -r requirements.txt \
        -c requirements.lock \
    && rm -r requirements.txt requirements.lock pyproject.toml client

COPY deepseek/__init__.py deepseek/onnxruntime_session.py deepseek/precisions.py deepseek/targets.py deepseek/
COPY deepseek/spec deepseek/spec
COPY client/deepseek_client deepseek_client
COPY cli cli
COPY serving serving
COPY docker/server.sh docker/healthy.sh /usr/local/bin/
# COPY keeps file modes, also those of a clone made with umask 077. COPY --chmod would need BuildKit.
RUN chmod -R a+rX cli deepseek deepseek_client serving /usr/local/bin/server.sh /usr/local/bin/healthy.sh
ENV PATH=/opt/serving/python/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp DEEPSEEK_BUILD=/tmp/build DEEPSEEK_TRITON_TAG=${TRITON_TAG} CUDA_DEVICE_ORDER=PCI_BUS_ID \
    ORT_DISABLE_TELEMETRY=1
USER 10001:10001
EXPOSE 8000 8001 8002 8003
# Loading and warm-up may take minutes.
HEALTHCHECK --interval=5s --timeout=3s --start-period=300s --retries=3 CMD ["healthy.sh", "8000", "/v2/health/ready"]
ENTRYPOINT ["server.sh"]
