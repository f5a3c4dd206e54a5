"""veneer: parameter-efficient fine-tuning of pretrained models.

The public names stand in `__init__.pyi` and are imported when they are first used, so that `import veneer` costs
next to nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
