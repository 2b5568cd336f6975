"""The stages of the build, one command each. They never import one another; they exchange files.

Enter: `deepseek engine` runs them in order. Imports: `deepseek`, the other rooms of `export` except `checks`.
"""
