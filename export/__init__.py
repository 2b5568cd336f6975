"""The build: from PyTorch to the model repository. `pipeline` declares the stages, `build` runs them.

Enter: `deepseek engine`. Imports: `deepseek`; `checks` also the client.
"""
