# Stand-in for nvcr.io/nvidia/tensorrt: the package `tensorrt` outside any environment.
ARG BASE
FROM ${BASE}
COPY image/tensorrt /opt/stand_in/tensorrt
RUN echo /opt/stand_in >"$(python3 -c 'import site; print(site.getsitepackages()[0])')/tensorrt.pth"
WORKDIR /workspace
