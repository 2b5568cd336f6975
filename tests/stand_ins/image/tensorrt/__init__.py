# mypy: ignore-errors
"""Stand-in for TensorRT's Python package: a plan is TensorRT's header, a line of facts and the ONNX graph.

Contract: has the names that the project uses (tests/test_tensorrt_api.py compares those with NVIDIA's bindings), and
refuses what TensorRT refuses: a graph that ONNX finds invalid, a profile out of order, a plan of another version.
Importing it makes torch's CUDA calls work on the CPU (`tensorrt.cuda`).
"""

import json
import os
import struct
from enum import IntEnum, auto

import onnx
from onnx import TensorProto

from tensorrt import cuda
from tensorrt.engine import Engine
from tensorrt.layers import LayerType as LayerType
from tensorrt.layers import Network, types

__version__ = "11.4.0.106"
HEADER_BYTES = 28  # of a plan: kind, length and version, where serving/repository/checks.py reads them
if not os.path.exists("/usr/bin/nvidia-smi"):  # the container was started without --gpus
    raise ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")
cuda.install()

float32, float16, bfloat16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
int8, fp8 = TensorProto.INT8, TensorProto.FLOAT8E4M3FN


plugins_of = []  # calls of the next, which some graphs need


def init_libnvinfer_plugins(logger, namespace):
    """Registers the plugins."""
    plugins_of.append(namespace)
    return True


def is_plugin(node):
    """Whether TensorRT runs a node by a plugin."""
    return node.op_type == "ScatterElements" and any(each.name == "reduction" for each in node.attribute)


class ILogger:
    """Base of loggers."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self, *_):
        pass

    def log(self, severity, message):
        pass


class Logger(ILogger):
    """A logger of a severity."""


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class ProfilingVerbosity(IntEnum):
    DETAILED = 2


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class BuilderFlag(IntEnum):
    TF32 = auto()
    VERSION_COMPATIBLE = auto()


class HardwareCompatibilityLevel(IntEnum):
    NONE = 0
    AMPERE_PLUS = 1
    SAME_COMPUTE_CAPABILITY = 2


class LayerInformationFormat(IntEnum):
    JSON = 1


class OnnxParser:
    """Reads a graph into a network."""

    num_errors = 0

    def __init__(self, network, logger):
        self.network, self.logger = network, logger

    def parse_from_file(self, path):
        try:
            onnx.checker.check_model(path)
            if any(map(is_plugin, onnx.load(path).graph.node)) and not plugins_of:
                raise ValueError("ScatterElements plugin was not found in the plugin registry")
            self.network.fill(onnx.load(path))
        except Exception as error:
            self.logger.log(ILogger.ERROR, str(error))
            return False
        return True


TIMINGS = b"stand-in timings"


class TimingCache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return self.content


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, least, usual, most):
        self.shapes[name] = {"min": list(least), "opt": list(usual), "max": list(most)}


class Config:
    """What a build is asked for."""

    def __init__(self):
        self.flags, self.cache, self.profiles = {BuilderFlag.TF32}, TimingCache(b""), []

    def set_memory_pool_limit(self, pool, size_bytes):
        pass

    def set_flag(self, flag):
        self.flags.add(flag)

    def get_flag(self, flag):
        return flag in self.flags

    def add_optimization_profile(self, profile):
        for shapes in profile.shapes.values():
            if any(not a <= b <= c for a, b, c in zip(*shapes.values(), strict=True)):
                return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, content):
        return TimingCache(TIMINGS) if content in (b"", TIMINGS) else None

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache is None:
            raise TypeError("set_timing_cache(): incompatible function arguments")
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class Builder:
    """Makes networks and plans."""

    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        names = {network.get_input(index).name for index in range(network.num_inputs)}
        if not config.profiles or set(config.profiles[0].shapes) != names:
            self.logger.log(ILogger.ERROR, f"no profile for {sorted(names)}")
            return None
        facts = {"tensorrt": __version__, "profile": config.profiles[0].shapes}
        facts["code"] = config.get_flag(BuilderFlag.VERSION_COMPATIBLE)
        body = json.dumps(facts).encode() + b"\n" + network.model.SerializeToString()
        version = bytes((11, 4, 0, 106))
        return b"ftrt" + bytes(12) + struct.pack("<Q", HEADER_BYTES + len(body)) + version + body


class Runtime:
    """Loads plans of this version."""

    engine_host_code_allowed = False

    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        line, _, graph = bytes(plan)[HEADER_BYTES:].partition(b"\n")
        facts = json.loads(line)
        if facts["tensorrt"] != __version__ or (facts["code"] and not self.engine_host_code_allowed):
            return None
        return Engine(graph, facts["profile"], types)
