"""Information about adapters and runs: inspection, comparison, deployment, forecasts and the environment.

The functions here return data; `cli` prints it.
"""
