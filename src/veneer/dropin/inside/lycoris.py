"""`peft.tuners.lycoris_utils`: what LoHa and LoKr have in common."""

from __future__ import annotations

import inspect
from typing import Any

from ..absent import NotInDropIn
from ..configs import CONFIGS, PeftType
from ..layers import LAYERS
from ..tables import names
from ..tuners import TUNERS

KINDS = (PeftType("LOHA"), PeftType("LOKR"))


class Either(type):
    """Metaclass of classes that stand for LoHa's and LoKr's classes alike, and have no instances of their own."""

    classes: tuple[Any, ...]

    @property
    def __signature__(cls) -> inspect.Signature | None:
        return names.constructor("peft.tuners.lycoris_utils", cls.__name__)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.classes[0], name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        ours = " or ".join(each.__name__ for each in cls.classes)
        raise NotInDropIn(f"{cls.__name__} is only for isinstance() and issubclass(); make a {ours}")

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.classes)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return super().__subclasscheck__(subclass) or issubclass(subclass, cls.classes)


class LycorisConfig(metaclass=Either):
    classes = tuple(CONFIGS[kind] for kind in KINDS)


class LycorisLayer(metaclass=Either):
    classes = (LAYERS["LOHA"]["LoHaLayer"], LAYERS["LOKR"]["LoKrLayer"])


class LycorisTuner(metaclass=Either):
    classes = tuple(TUNERS[kind] for kind in KINDS)
