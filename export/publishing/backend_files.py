"""The source files of this project's Python backend, which run inside Triton beside a model. Imports nothing heavy."""

from pathlib import Path

from deepseek.spec import DeploymentSpec, Target
from export.dependencies.sources import ROOT

BACKEND = ROOT / "serving" / "backend"
LIBRARY = ROOT / "deepseek"
BACKEND_SOURCES = {
    "model.py": BACKEND / "onnxruntime_backend.py",
    "onnxruntime_session.py": LIBRARY / "onnxruntime_session.py",
    "bulk_requests.py": BACKEND / "bulk_requests.py",
    "compute_slots.py": BACKEND / "compute_slots.py",
    "model_inputs.py": BACKEND / "model_inputs.py",
}
NUMPY = {"numpy1_stub.py": BACKEND / "numpy1_stub.py"}
TEXT = {**NUMPY, "text_requests.py": BACKEND / "text_requests.py", "text_encoder.py": LIBRARY / "text_encoder.py"}
NAMES = {
    **NUMPY,
    "vocabulary_requests.py": BACKEND / "vocabulary_requests.py",
    "vocabulary.py": LIBRARY / "vocabulary.py",
}


def backend_files(spec: DeploymentSpec, target: Target) -> dict[str, Path]:
    """Sources by file name in a version's folder; empty if a backend of Triton's own runs the model alone."""
    front = spec.has_front(target)
    ours = front or spec.runs_in_python(target)
    return {
        **(BACKEND_SOURCES if ours else {}),
        **({"engine_model.py": BACKEND / "engine_model.py"} if front else {}),
        **(TEXT if spec.text_for(target) else {}),
        **(NAMES if spec.vocabulary_for(target) else {}),
    }
