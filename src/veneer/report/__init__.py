"""Reports on adapters and planned runs: inspection, comparison, deployment, forecasts and the environment.

May import any package below it, and `train` for recipes. The functions return data; `cli` prints it. Start with
`inspection.py`.
"""
