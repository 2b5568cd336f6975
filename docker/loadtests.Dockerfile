# Load tests as a container: Locust, the client and the models' deploy.toml. The profile `loadtest` of compose.yaml runs it
# against the gateway or Triton; build/ is mounted at /build, where it finds the inputs and leaves its runs.
# Runs as any user id, with a read-only root file system, no capabilities, /tmp writable.
ARG BASE=debian:trixie-slim
FROM ${BASE} AS build
# Debian's packages are not pinned: a security update takes the old version off the mirrors, and the build would fail.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/loadtests
COPY pyproject.toml requirements.lock ./
COPY client client
ARG EXTRAS="loadtest"
RUN python3 -m venv /opt/loadtests/python \
    && python/bin/python -c "import sys, tomllib; \
        project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = project['optional-dependencies']; \
        print(*project['dependencies'], *(line for extra in sys.argv[1:] for line in extras[extra]), sep='\n')" \
        ${EXTRAS} >requirements.txt \
    && python/bin/pip install --no-cache-dir --no-compile -r requirements.txt ./client -c requirements.lock \
    && python/bin/pip uninstall --yes pip \
    && rm -r requirements.txt requirements.lock pyproject.toml client

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/loadtests /opt/loadtests
WORKDIR /opt/loadtests
COPY deepseek/__init__.py deepseek/
COPY deepseek/spec deepseek/spec
COPY loadtests loadtests
ENV PATH=/opt/loadtests/python/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp BUILD=/build
USER 10001:10001
# It runs to its end: there is nothing whose health could be asked.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m"]
CMD ["loadtests.run", "--help"]
