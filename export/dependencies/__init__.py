"""What a stage depends on besides files of earlier stages: its code and what that imports, installed packages, digests.

Enter: `export.stage_inputs` asks, `export.build` installs a model folder's requirements. Imports: `deepseek`.
"""
