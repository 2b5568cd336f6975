# Stand-in for nvcr.io/nvidia/tritonserver: Triton 2.51 of the wheel nvidia-pytriton behind NVIDIA's path and flags.
ARG BASE
FROM ${BASE}
ARG TRITON_TAG
RUN useradd --uid 1000 triton-server \
    && touch /usr/lib/x86_64-linux-gnu/libnvinfer.so.11.4.0 \
    && wheel="$(python3 -c 'import importlib.metadata as m; print(m.distribution("nvidia-pytriton").locate_file(""))')" \
    && version="$(python3 -c 'import sys; print("{}.{}".format(*sys.version_info[:2]))')" \
    && mkdir -p /opt/tritonserver/backends/python \
    && find "$wheel/pytriton/tritonserver/backends/python" -maxdepth 1 -type f \
        -exec cp -t /opt/tritonserver/backends/python {} + \
    && cp "$wheel/pytriton/tritonserver/python_backend_stubs/$version/triton_python_backend_stub" \
        /opt/tritonserver/backends/python/ \
    && chmod a+x /opt/tritonserver/backends/python/triton_python_backend_stub \
        "$wheel/pytriton/tritonserver/bin/tritonserver" \
    && mkdir /opt/stand_in && ln -s "$wheel" /opt/stand_in/wheel \
    && mkdir -p /opt/tritonserver/backends/dali/wheel/dali/numpy \
    && echo 'raise ImportError("the numpy of DALI")' >/opt/tritonserver/backends/dali/wheel/dali/numpy/__init__.py
COPY image/tritonserver image/flags.txt /opt/tritonserver/bin/
COPY image/plan_model.py /opt/stand_in/
ENV PATH=/opt/tritonserver/bin:${PATH} NVIDIA_TRITON_SERVER_VERSION=${TRITON_TAG} \
    PYTHONPATH=/opt/tritonserver/backends/dali/wheel/dali:
WORKDIR /opt/tritonserver
