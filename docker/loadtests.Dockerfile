# Load tests as a container: Locust, the client, the verdict. The profile `loadtest` of compose.yaml runs it against the
# gateway or Triton; models/ is mounted at /models, real inputs at /inputs.npz, and its runs are left in /results.
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
COPY client/pyproject.toml client/
ARG EXTRAS="loadtest"
RUN python3 -m venv /opt/loadtests/python \
    && python/bin/python -c "import sys, tomllib; \
        project, client = (tomllib.load(open(path, 'rb'))['project'] for path in sys.argv[1:3]); \
        extras = project['optional-dependencies']; \
        print(*project['dependencies'], *client['dependencies'], \
            *(line for extra in sys.argv[3:] for line in extras[extra]), sep='\n')" pyproject.toml client/pyproject.toml \
        ${EXTRAS} >requirements.txt \
    && python/bin/pip install --no-cache-dir --no-compile -r requirements.txt -c requirements.lock \
    && python/bin/pip uninstall --yes pip \
    && rm -r requirements.txt requirements.lock pyproject.toml client

FROM ${BASE}
# ca-certificates: whom --tls trusts
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/loadtests /opt/loadtests
WORKDIR /opt/loadtests
COPY deepseek/__init__.py deepseek/
COPY deepseek/spec deepseek/spec
COPY client/deepseek_client deepseek_client
COPY loadtests loadtests
COPY docker/loadtests.sh /usr/local/bin/
# COPY keeps modes, of a clone made under umask 077, too; its --chmod takes BuildKit.
RUN chmod -R a+rX deepseek deepseek_client loadtests /usr/local/bin/loadtests.sh
ENV PATH=/opt/loadtests/python/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp BUILD=/results
USER 10001:10001
# It runs to its end: there is nothing whose health could be asked.
HEALTHCHECK NONE
ENTRYPOINT ["loadtests.sh"]
