"""Recording rules, alerts and the dashboard, generated from each model's SLO.

Enter: `deepseek stack` writes them; `deepseek alerts` prints the rules. Imports: `serving.repository`.
"""
