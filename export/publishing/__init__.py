"""What a version in the model repository consists of, apart from the engine: `config.pbtxt`, the backend's sources, and
the model in front of an engine that takes texts or names.

Enter: `export.stages.publish` and `export.pipeline`. Imports: `deepseek`, `export`.
"""
