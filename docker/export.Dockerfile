# `make engine TARGET=tensorrt` compiles in this image: NVIDIA's TensorRT container with the server's tag, so that engine and
# server have the same TensorRT, plus the Python packages of the export stages. The code is mounted, so the image changes
# only with its packages. See docs/tensorrt.md.
ARG TRITON_TAG=26.10
# Override to try this file without access to nvcr.io.
ARG BASE=nvcr.io/nvidia/tensorrt:${TRITON_TAG}-py3
FROM ${BASE}
ARG TRITON_TAG

# The system's Python has TensorRT and belongs to the distribution, so packages go into an environment on top.
RUN python3 -m venv --system-site-packages --without-pip /opt/export
ENV PATH=/opt/export/bin:${PATH} PYTHONUNBUFFERED=1

WORKDIR /opt/export
COPY pyproject.toml requirements.lock ./
# Dependencies only. None of these extras contains pip's tensorrt, which would hide the container's.
ARG EXTRAS="train export cpu"
RUN python -c "import sys, tomllib; \
        project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = project['optional-dependencies']; \
        print(*project['dependencies'], *(line for extra in sys.argv[1:] for line in extras[extra]), sep='\n')" \
        ${EXTRAS} >requirements.txt \
    && PIP_CONSTRAINT='' python -m pip install --no-cache-dir -r requirements.txt -c requirements.lock
RUN python -c "import importlib.util, sys; found = importlib.util.find_spec('tensorrt'); \
        sys.exit(None if found and not found.origin.startswith('/opt/export') else 'the base image has no TensorRT')"

# The build compares this with its TRITON_TAG; if equal, it runs the stages here.
ENV DEEPSEEK_INSIDE_TAG=${TRITON_TAG}
# bash reads $BASH_ENV, with which NVIDIA's images choose the CUDA libraries for the driver. NVIDIA's own entrypoint would
# print a banner into the stages' output.
ENTRYPOINT ["/bin/bash", "-c", "exec \"$@\"", "export"]
CMD ["python", "-m", "cli", "to-tensorrt", "--help"]
