"""Exports the checkpoint for infinity-emb's engine `optimum`: `python to_onnx.py FOLDER` writes FOLDER/onnx/model.onnx."""

import os
import sys

import torch
from transformers import AutoModel, AutoTokenizer

folder, inputs, output = sys.argv[1], ["input_ids", "attention_mask", "token_type_ids"], "last_hidden_state"
os.makedirs(f"{folder}/onnx")
example = AutoTokenizer.from_pretrained(folder)(["a text", "a longer text"], padding=True, return_tensors="pt")
torch.onnx.export(
    AutoModel.from_pretrained(folder).eval(),
    tuple(example[name] for name in inputs),
    f"{folder}/onnx/model.onnx",
    input_names=inputs,
    output_names=[output],
    opset_version=17,
    dynamo=False,
    dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*inputs, output)},
)
