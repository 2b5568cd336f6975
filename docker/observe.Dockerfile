# Prometheus and Alertmanager from Debian's packages, for docker/compose.offline.yaml: without a registry.
ARG BASE=debian:trixie-slim
FROM ${BASE}
# Debian's packages are not pinned: mirrors drop old versions after a security update, and the build would fail.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends prometheus prometheus-alertmanager \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir /prometheus /alertmanager \
    && chown 65534:65534 /prometheus /alertmanager
USER 65534:65534
# One image for two programs: compose.yaml has the health check of each.
HEALTHCHECK NONE
