"""Planning before anything is built."""

from argparse import Namespace

from cli.commands import shared_options as shared
from cli.options import Number, Option, folder_name, path, switch
from cli.table import Command
from deepseek.precisions import BITS

SIZE = Number("a whole number, 1 to 1,000,000,000,", least=1, most=1e9, whole=True)
AMOUNT = Number("a number, 1e-6 to 1e12,", least=1e-6, most=1e12)
OR_NONE = Number("a number, 0 to 1e12,", least=0, most=1e12)


def _model(values: Namespace) -> str | None:
    """The model folder to plan where nothing else says what is planned."""
    return None if values.preset or values.onnx or values.layers is not None else "recommender"


_MODEL = (
    Option("--model", "model folder whose graph is built (default: recommender)", kind=folder_name, default=_model),
    shared.MODELS,
    shared.BUILD,
    Option("--onnx", "plan this ONNX file", kind=path),
    Option("--axis", "size of an open axis of the ONNX file", repeat=True, metavar="NAME=SIZE"),
    Option("--preset", "plan a well-known shape", choices=("bert-base", "bert-large", "gpt2-xl", "gpt3-175b")),
    Option("--layers", "plan a Transformer by its sizes, with --hidden and --heads", kind=SIZE),
    Option("--hidden", "width of the hidden states", kind=SIZE),
    Option("--heads", "number of attention heads", kind=SIZE),
    Option("--ffn", "width of the feed-forward layer (default: 4 x hidden)", kind=SIZE),
    Option("--vocab", "size of the vocabulary (default: 32000)", kind=SIZE),
    Option("--max-length", "longest sequence (default: --length, or 512)", kind=SIZE),
    Option("--head", "logits over the vocabulary", choices=("none", "tied", "untied"), default="none"),
)
_TRAINING = (
    Option("--length", "tokens of a sample (default: the model's longest, or opt in deploy.toml)", kind=SIZE),
    Option("--batch", "samples at once, the micro-batch", kind=SIZE, default=32),
    Option("--accumulation", "micro-batches a step", kind=SIZE, default=1),
    Option("--train-precision", "precision of training", choices=("fp32", "fp16", "bf16"), default="fp32"),
    Option("--mixed", "how 16 bits are used in training", choices=("autocast", "master"), default="autocast"),
    Option("--optimizer", "optimizer of training", choices=("adamw", "momentum", "sgd"), default="adamw"),
    Option("--checkpointing", "recompute activations in the backward pass", kind=switch),
)
_SERVING = (
    Option("--precision", "precision of serving", choices=("auto", *BITS), default="auto"),
    Option("--serving-batch", "batch size (default: 8, or opt in deploy.toml)", kind=SIZE),
    Option("--instances", "copies of the model side by side", kind=SIZE, default=1),
    Option("--generate", "generate token by token, with keys and values cached", kind=switch),
    Option("--rate", "requests/s at the peak; adds replicas and cost", kind=AMOUNT),
    Option("--p99-ms", "latency limit for 99 % of the requests", kind=AMOUNT, default=50.0),
    Option("--growth", "share by which the rate rises a minute", kind=OR_NONE, default=0.1),
    Option("--scale-out-s", "seconds until a new replica answers", kind=OR_NONE, default=120.0),
    Option("--capacity", "file that deepseek capacity wrote (default: the model's, if it is there)", kind=path),
    Option("--price", "USD an hour of the machine that deepseek capacity measured", kind=OR_NONE),
)
_DEVICES = (
    Option("--devices", "file of devices (default: deepseek/devices.toml)"),
    Option("--device", "only this device; may be repeated", repeat=True),
    Option("--disk-mb-s", "sequential bandwidth of the disk, MB/s", kind=AMOUNT, default=500.0),
    Option("--measure", "measure this machine first, and an ONNX graph on it", kind=switch),
    shared.JSON,
)

ROWS = (
    Command(
        "plan",
        "deepseek.sizing.plan_hardware",
        "plan memory, devices, parallelism, speed and cost of a model",
        options=(*_MODEL, *_TRAINING, *_SERVING, *_DEVICES),
        examples=(
            "deepseek plan --preset bert-base --length 384 --batch 32",
            "deepseek plan --model minilm --rate 2000 --p99-ms 30",
            "deepseek plan --layers 80 --hidden 8192 --heads 64 --max-length 4096 --generate --device h100",
            "deepseek plan --onnx resnet50.onnx --precision int8 --devices my-devices.toml --json",
            "deepseek plan --model minilm --measure  # and measure this machine and the graph on it",
        ),
        notes="GB are 1e9 bytes. docs/plan.md says how exact the predictions are.",
        flags_variable="PLAN",
    ),
)
