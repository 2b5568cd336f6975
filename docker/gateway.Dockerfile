# The gateway: Debian's nginx with njs, configured by docker/gateway/. Certificate, keys and limits are mounted at
# /etc/gateway. Runs as any user id, with a read-only root file system, no capabilities and a writable /tmp (compose.yaml).
ARG BASE=debian:trixie-slim
FROM ${BASE}
# Debian's packages are not pinned: mirrors drop old versions after a security update, and the build would fail.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnginx-mod-http-js nginx-light openssl \
    && rm -rf /var/lib/apt/lists/*
COPY docker/gateway /opt/gateway
COPY docker/healthy.sh /usr/local/bin/
# COPY keeps file modes, also those of a clone made with umask 077. COPY --chmod would need BuildKit.
RUN chmod -R a+rX /opt/gateway /usr/local/bin/healthy.sh
USER 10001:10001
EXPOSE 8443 8000 8001 9145
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 CMD ["healthy.sh", "9145", "/healthz"]
ENTRYPOINT ["/opt/gateway/gateway.sh"]
