"""Parts of PEFT's inner modules that programs import, as views of veneer's engine: one file for each module of PEFT.

The formulas are in `methods` and `maths`. `INSIDE` says which module of PEFT each file stands for.
"""

from __future__ import annotations

from types import ModuleType

from . import (
    arrow,
    asa_callback,
    corda,
    eva,
    incremental_pca,
    loha,
    lokr,
    lorafa,
    loraga,
    lycoris,
    monteclora,
    osf,
    prefixes,
    riemannian,
    shadow,
    variants,
    velora,
)

INSIDE: dict[str, ModuleType] = {
    "peft.optimizers.lorafa": lorafa,
    "peft.optimizers.riemannian": riemannian,
    "peft.tuners.adamss.asa_callback": asa_callback,
    "peft.tuners.loha.layer": loha,
    "peft.tuners.lokr.layer": lokr,
    "peft.tuners.lora.arrow": arrow,
    "peft.tuners.lora.corda": corda,
    "peft.tuners.lora.eva": eva,
    "peft.tuners.lora.loraga": loraga,
    "peft.tuners.lora.monteclora": monteclora,
    "peft.tuners.lora.variants": variants,
    "peft.tuners.lora.velora": velora,
    "peft.tuners.lycoris_utils": lycoris,
    "peft.tuners.osf.utils": osf,
    "peft.tuners.shadow.layers": shadow,
    "peft.tuners.tuners_utils": prefixes,
    "peft.utils.incremental_pca": incremental_pca,
}
"""The module of this package for a module of PEFT; only names that PEFT's module has are taken from it."""
