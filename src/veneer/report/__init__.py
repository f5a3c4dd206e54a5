"""What is said about an adapter or a run: inspection, comparison, deployment, forecasts, the environment.

Everything here returns data; `cli` prints it.
"""
