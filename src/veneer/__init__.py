"""veneer: parameter-efficient fine-tuning of pretrained models.

The public names are listed in `__init__.pyi` and imported on first use, so `import veneer` is fast.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
