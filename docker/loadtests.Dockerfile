# Load tests: Locust, the client, the verdict. The profile `loadtest` of compose.yaml runs it against the gateway or Triton.
# It reads models at /models and inputs at /inputs.npz, and leaves its runs in /results.
# Runs as any user id, with a read-only root file system, no capabilities and a writable /tmp.
ARG BASE=debian:trixie-slim
FROM ${BASE} AS build
# Debian's packages are not pinned: mirrors drop old versions after a security update, and the build would fail.
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
# ca-certificates: what --tls trusts
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/loadtests /opt/loadtests
WORKDIR /opt/loadtests
COPY deepseek/__init__.py deepseek/onnxruntime_session.py deepseek/precisions.py deepseek/targets.py deepseek/
COPY deepseek/spec deepseek/spec
COPY client/deepseek_client deepseek_client
COPY cli cli
COPY loadtests loadtests
COPY docker/loadtests.sh /usr/local/bin/
# COPY keeps file modes, also those of a clone made with umask 077. COPY --chmod would need BuildKit.
RUN chmod -R a+rX cli deepseek deepseek_client loadtests /usr/local/bin/loadtests.sh
ENV PATH=/opt/loadtests/python/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp DEEPSEEK_BUILD=/results
USER 10001:10001
# It runs and ends: nothing to check.
HEALTHCHECK NONE
ENTRYPOINT ["loadtests.sh"]
