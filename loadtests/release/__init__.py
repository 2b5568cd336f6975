"""The loads of a release: shadow traffic before the switch, steady traffic during it.

Enter: `deepseek release` runs both as commands. Imports: `loadtests.load`, `loadtests.slo`.
"""
