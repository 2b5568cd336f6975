"""Commands that build: from weights to the model repository."""

from cli.commands import shared_options as shared
from cli.options import Number, Option, folder_name, path, path_text, switch
from cli.table import Command
from deepseek.precisions import CHOICES, PRECISIONS, REDUCED
from deepseek.targets import PUBLISHABLE, TARGETS

ANYWAY = Option("--anyway", "publish even what a release gate refused or a rollback removed", kind=switch)
TUNED = Option("--tuned", "file of tuned values (default: the one that deploy.toml names; /dev/null: none)", kind=path)
PRUNED = Number("a number above 0, up to 0.99,", least=0, most=0.99, inclusive=False)
CANDIDATE = Option("--candidate", "one of several: if it fails to build, record why and exit 0", kind=switch)
BUILD_OPTIONS = (
    *shared.MODEL,
    shared.REPOSITORY,
    Option("--precision", "precision to serve; auto: the fastest inside the budget", choices=CHOICES, default="auto"),
    Option("--target", "what runs the model; auto: TensorRT if possible", choices=("auto", *TARGETS), default="auto"),
    Option("--prune", "share of heads and channels to prune, such as 0.25 (default: none)", kind=PRUNED),
    Option(
        "--data",
        "click log in place of MovieLens-100K (csv: user,item,timestamp), or a folder of them",
        kind=path_text,
        exported=True,
    ),
    shared.TRITON_TAG,
    Option("--native", "build TensorRT engines with this machine's TensorRT, not in NVIDIA's container", kind=switch),
    shared.CACHE,
    shared.CACHE_GIB,
)
"""Commands that build."""

ROWS = (
    Command(
        "engine",
        "export.build",
        "build a model up to the repository; rebuild only what changed",
        options=(
            *BUILD_OPTIONS,
            ANYWAY,
            Option(
                "--explain",
                "build nothing; print one line for each stage: up to date, cached, or why it is rebuilt",
                kind=switch,
                variable="",
            ),
            *shared.STACK,
        ),
        examples=(
            "deepseek engine",
            "deepseek engine --explain",
            "deepseek engine --model minilm --precision int8 --prune 0.25",
        ),
        in_short_help=True,
    ),
    Command(
        "clean",
        "export.clean",
        "remove what was built for a model; keep your own lines in the env file, and the stack's name and ports",
        options=(*shared.MODEL, shared.REPOSITORY, shared.ENV_FILE),
        examples=("deepseek clean --model minilm",),
    ),
    Command(
        "distclean",
        "export.clean:everything",
        "remove all that was built, and all models of the repository; make distclean removes the environment too",
        options=(shared.BUILD, shared.REPOSITORY, shared.ENV_FILE),
        examples=("deepseek distclean",),
    ),
    Command(
        "check-engine",
        "export.checks.check_engine",
        "build every precision of every model with TensorRT for RTX, no GPU needed",
        options=(
            Option("--model", "only this model; repeat (default: all in --models)", kind=folder_name, repeat=True),
            shared.MODELS,
            shared.BUILD,
            Option("--precision", "only this one; repeat (default: all)", choices=CHOICES, repeat=True),
            Option("--no-build", "check existing graphs; build none", kind=switch),
            shared.JSON,
        ),
        examples=("deepseek check-engine", "deepseek check-engine --model recommender --precision int8 --json"),
    ),
    Command(
        "clean-cache",
        "export.cache:clear",
        "remove all artifacts from the shared cache",
        options=(shared.CACHE,),
        examples=("deepseek clean-cache",),
    ),
)
STAGES = (
    Command(
        "train",
        "export.stages.train",
        "train the model, or take its weights from the cache",
        options=(*shared.MODEL, shared.JSON),
        examples=("deepseek train", "deepseek train --models /some/dir --model other"),
    ),
    Command(
        "prune",
        "export.stages.prune",
        "remove attention heads and channels, then fine-tune",
        options=(
            *shared.MODEL,
            Option("--ratio", "share of the heads, and of the removable channels", kind=PRUNED, default=0.25),
            shared.JSON,
        ),
        examples=("deepseek prune --ratio 0.2", "deepseek prune --models tests/models --model image --json"),
    ),
    Command(
        "to-onnx",
        "export.stages.to_onnx",
        "export PyTorch to the fp32 ONNX graph",
        options=(*shared.MODEL, shared.JSON),
        examples=("deepseek to-onnx", "deepseek to-onnx --models /some/dir --model other --json"),
    ),
    Command(
        "quantize",
        "export.stages.quantize",
        "write fp16, int8 or fp8 into the graph",
        options=(
            *shared.MODEL,
            Option("--precision", "precision of the new graph", choices=REDUCED, required=True),
            Option("--calibration-data", "real inputs (default: build/<name>/calibration.npz)", kind=path_text),
            Option(
                "--target",
                "what will run the graph; decides how 8-bit graphs are made, and where trials run",
                choices=tuple(TARGETS),
                default="onnxruntime",
            ),
            CANDIDATE,
            shared.JSON,
        ),
        examples=(
            "deepseek quantize --precision int8",
            "deepseek quantize --precision int8 --calibration-data val_dataset.bin",
        ),
    ),
    Command(
        "to-tensorrt",
        "export.stages.to_tensorrt",
        "compile an ONNX graph to a TensorRT engine",
        options=(
            *shared.MODEL,
            Option("--precision", "precision of the graph", choices=tuple(PRECISIONS), required=True),
            Option("--target", "what runs the engine", choices=("tensorrt", "tensorrt_rtx"), default="tensorrt"),
            CANDIDATE,
            shared.JSON,
        ),
        examples=(
            "deepseek to-tensorrt --precision fp16 --target tensorrt_rtx",
            "deepseek to-tensorrt --precision int8 --target tensorrt",
        ),
    ),
    Command(
        "to-torchscript",
        "export.stages.to_torchscript",
        "export PyTorch to TorchScript",
        options=(*shared.MODEL, shared.JSON),
        examples=("deepseek to-torchscript", "deepseek to-torchscript --models /some/dir --model other --json"),
    ),
    Command(
        "select-precision",
        "export.stages.select_precision",
        "compare every precision with fp32 and choose one",
        options=(
            *shared.MODEL,
            Option("--target", "what runs the model", choices=tuple(TARGETS), default="onnxruntime"),
            Option("--precision", "judge this one only; auto: all candidates", choices=CHOICES, default="auto"),
            shared.JSON,
        ),
        examples=("deepseek select-precision", "deepseek select-precision --precision int8 --json"),
    ),
    Command(
        "measure-batches",
        "export.stages.measure_batches",
        "measure how long batches take here, from which batching and queue follow",
        options=(
            *shared.MODEL,
            Option("--target", "what runs the model", choices=("onnxruntime",), default="onnxruntime"),
            Option("--precision", "precision to measure (default: the chosen one)", choices=tuple(PRECISIONS)),
            TUNED,
            Option("--output", "file to write (default: build/<model>/batches-<target>.json)", kind=path),
            shared.JSON,
        ),
        examples=("deepseek measure-batches", "deepseek measure-batches --model minilm --json"),
    ),
    Command(
        "publish",
        "export.stages.publish",
        "publish the chosen precision to the model repository",
        options=(
            *shared.MODEL,
            Option("--target", "what runs the model", choices=PUBLISHABLE, default="onnxruntime"),
            Option("--precision", "precision to publish (default: the chosen one)", choices=tuple(PRECISIONS)),
            shared.REPOSITORY,
            TUNED,
            Option("--if-changed", "publish only if something differs from the latest version", kind=switch),
            ANYWAY,
            shared.JSON,
        ),
        examples=(
            "deepseek publish",
            "deepseek publish --target tensorrt --precision fp16 --repository /models",
        ),
    ),
)
INTERNAL = (
    Command(
        "tensorrt-container",
        "export.runtimes.tensorrt_container",
        "run a stage in NVIDIA's TensorRT container",
        options=(
            Option("--tag", "release of NVIDIA's containers, YY.MM (default: the one this project is tested with)"),
            shared.MODELS,
            shared.BUILD,
            Option("command", "command of deepseek and its flags, after --", rest=True),
        ),
        examples=(
            "deepseek tensorrt-container -- to-tensorrt --precision int8",
            "deepseek tensorrt-container --tag 26.10 -- to-tensorrt --precision fp16",
        ),
    ),
)
