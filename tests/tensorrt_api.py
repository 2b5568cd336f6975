"""Reads the Python API of a TensorRT version from its bindings wheel, without the library and without a GPU.

Contract: writes `tests/tensorrt_api.json`, which `tests/test_tensorrt_api.py` compares with the code: for each version,
the public names of the module and of its classes, and the signatures of the methods that the code calls. The bindings are one shared object that needs five TensorRT
libraries. Empty libraries with the linked functions are enough to import it and list its names. Needs `cc` and the
Python that the wheel is for.

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
from typing import Any

API: Path = Path(__file__).parent / "tensorrt_api.json"
# Classes that the code uses, and enumerations whose members it names.
CLASSES = (
    *("Builder", "BuilderFlag", "EngineInspector", "HardwareCompatibilityLevel", "IBuilderConfig", "ICudaEngine"),
    *("IExecutionContext", "ILayer", "ILogger", "INetworkDefinition", "IOptimizationProfile", "ITensor"),
    *("ITimingCache", "LayerInformationFormat", "LayerType", "ProfilingVerbosity"),
    *("Logger", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "Runtime"),
)
LINKED = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)
READ = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import tensorrt as trt
public = lambda thing: " ".join(name for name in dir(thing) if not name.startswith("_"))
def signatures(method):
    owner, _, name = method.rpartition(".")
    found = getattr(getattr(trt, owner) if owner else trt, name)
    text = (found.__init__ if isinstance(found, type) else found).__doc__ or ""
    return re.findall(r"^(?:\\d+\\. )?(?:__init__|%s)(\\(.*\\)) ->" % name, text, re.MULTILINE)
classes, methods = (argument.split() for argument in sys.argv[2:])
names = {"": public(trt), **{name: public(getattr(trt, name)) for name in classes}}
print(json.dumps({"names": names, "signatures": {method: signatures(method) for method in methods}}))
"""


def api_of(requirement: str, methods: list[str]) -> dict[str, dict[str, Any]]:
    """Of one `distribution==version`: "names", separated by spaces, by class ("" for the module); "signatures"."""
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
        read = [sys.executable, "-c", READ, str(binding.parent), " ".join(CLASSES), " ".join(methods)]
        run = subprocess.run(read, env={"LD_LIBRARY_PATH": scratch}, check=True, capture_output=True, text=True)
        return json.loads(run.stdout)


if __name__ == "__main__":
    from tests.test_tensorrt_api import calls

    called = sorted({f"{owner}.{name}".strip(".") for owner, name, _ in calls()})
    API.write_text(json.dumps({each: api_of(each, called) for each in sys.argv[1:]}, indent=1) + "\n")
