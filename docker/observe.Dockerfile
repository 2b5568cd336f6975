# Prometheus and Alertmanager out of Debian's packages, for docker/compose.offline.yaml: where no registry can be reached.
ARG BASE=debian:trixie-slim
FROM ${BASE}
# Debian's packages are not pinned: a security update takes the old version off the mirrors, and the build would fail.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends prometheus prometheus-alertmanager \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir /prometheus /alertmanager \
    && chown 65534:65534 /prometheus /alertmanager
USER 65534:65534
# Two programs in one image: compose.yaml says how each is asked for its health.
HEALTHCHECK NONE
