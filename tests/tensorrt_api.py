"""Reads the Python API of a TensorRT version off its bindings wheel, without the library and without a GPU.

Contract: makes `tests/tensorrt_api.json`, which `tests/test_tensorrt_api.py` compares the code with: for each version the
public names of the module and of its classes. The bindings are one shared object that needs five libraries of
TensorRT; empty ones with the functions that it links to let it be imported, and then it tells its names. Needs `cc`
and the Python that the wheel is for.

Example:
    python -m tests.tensorrt_api tensorrt-cu12-bindings==10.12.0.36 tensorrt-cu13-bindings==11.0.0.114 \\
        tensorrt-cu13-bindings==11.4.0.106
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

API = Path(__file__).parent / "tensorrt_api.json"
# Classes whose objects the code holds, and enumerations of which it names members.
CLASSES = (
    *("Builder", "BuilderFlag", "HardwareCompatibilityLevel", "IBuilderConfig", "ICudaEngine", "IExecutionContext"),
    *("ILayer", "ILogger", "INetworkDefinition", "IOptimizationProfile", "ITensor", "ITimingCache", "LayerType"),
    *("Logger", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "Runtime"),
)
LINKED = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)
READ = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt as trt
public = lambda thing: " ".join(name for name in dir(thing) if not name.startswith("_"))
print(json.dumps({"": public(trt), **{name: public(getattr(trt, name)) for name in sys.argv[2:]}}))
"""


def api_of(requirement: str) -> dict[str, str]:
    """Public names, spaces between, by class ("" for the module) of one `distribution==version`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, requirement]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extract("tensorrt_bindings/tensorrt.so", folder)
        binding = folder / "tensorrt_bindings" / "tensorrt.so"
        wanted = set(re.findall(rb"libnv[a-z]+(?:_plugin)?\.so\.\d+", binding.read_bytes()))
        (folder / "empty.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in LINKED))
        for library in map(bytes.decode, wanted):
            made = [f"-Wl,-soname,{library}", "-o", str(folder / library), str(folder / "empty.c")]
            subprocess.run(["cc", "-shared", "-fPIC", *made], check=True)
        read = [sys.executable, "-c", READ, str(binding.parent), *CLASSES]
        run = subprocess.run(read, env={"LD_LIBRARY_PATH": scratch}, check=True, capture_output=True, text=True)
        return json.loads(run.stdout)


if __name__ == "__main__":
    API.write_text(json.dumps({requirement: api_of(requirement) for requirement in sys.argv[1:]}, indent=1) + "\n")
