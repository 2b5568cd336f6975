# What both stand-ins for NVIDIA's images have: the distribution's Python with PyTorch and Triton from the tests' environment
# (tests/stand_ins/images.py sends them as root/), a start-up file for bash, an entry point, a pip constraint.
FROM debian:trixie-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libgomp1 libstdc++6 python3 \
    && rm -rf /var/lib/apt/lists/*
COPY root /
RUN ldconfig
COPY image/nvidia_entrypoint.sh /opt/nvidia/
COPY image/shinit_v2 /etc/
RUN sed -i '1i test -f /etc/shinit_v2 && source /etc/shinit_v2' /etc/bash.bashrc \
    && mkdir /etc/pip && echo 'numpy==1.26.4' >/etc/pip/constraint.txt
ENV BASH_ENV=/etc/bash.bashrc SHELL=/bin/bash PIP_CONSTRAINT=/etc/pip/constraint.txt NVIDIA_VISIBLE_DEVICES=all
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh"]
