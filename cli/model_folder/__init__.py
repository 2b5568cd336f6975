"""Writes the folder of a model: `deepseek new` from a template, `deepseek import` from a Hugging Face checkpoint.

Enter: `new`, `import_checkpoint`. Imports: `deepseek`, `export`.
"""
