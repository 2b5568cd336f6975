# What `make engine TARGET=tensorrt` compiles in: NVIDIA's TensorRT container of the server's tag, so that engine and
# server have the same TensorRT, and the Python packages of the export stages. The code is mounted, not copied in: the
# image changes only with its packages. See docs/tensorrt.md.
ARG TRITON_TAG=26.10
# Another base to try this file with, where nvcr.io cannot be reached.
ARG BASE=nvcr.io/nvidia/tensorrt:${TRITON_TAG}-py3
FROM ${BASE}
ARG TRITON_TAG

# The system's Python is the one with TensorRT, and belongs to the distribution: packages go into an environment on top.
RUN python3 -m venv --system-site-packages --without-pip /opt/export
ENV PATH=/opt/export/bin:${PATH} PYTHONUNBUFFERED=1

WORKDIR /opt/export
COPY pyproject.toml requirements.lock ./
# The dependencies alone, not the project. pip's tensorrt is in none of these extras: it would hide the container's.
ARG EXTRAS="train export cpu"
RUN python -c "import sys, tomllib; \
        project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = project['optional-dependencies']; \
        print(*project['dependencies'], *(line for extra in sys.argv[1:] for line in extras[extra]), sep='\n')" \
        ${EXTRAS} >requirements.txt \
    && PIP_CONSTRAINT='' python -m pip install --no-cache-dir -r requirements.txt -c requirements.lock
RUN python -c "import importlib.util, sys; found = importlib.util.find_spec('tensorrt'); \
        sys.exit(None if found and not found.origin.startswith('/opt/export') else 'the base image has no TensorRT')"

# Make compares this with its own TRITON_TAG: inside, it runs the stages as they are.
ENV DEEPSEEK_TRITON_TAG=${TRITON_TAG}
# bash reads $BASH_ENV, where NVIDIA's images choose the CUDA libraries that suit the driver; their own entrypoint
# would also print a banner into the stages' output.
ENTRYPOINT ["/bin/bash", "-c", "exec \"$@\"", "export"]
CMD ["python", "-m", "export.to_tensorrt", "--help"]
