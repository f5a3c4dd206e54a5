"""The modules, names and signatures of either library under the name peft: a program for both.

    python -m tests.peft_names peft                # prints everything the installed PEFT has, as JSON
    python -m tests.peft_names veneer listing.json # prints the same of veneer, for the names in a listing of PEFT's
    python -m tests.peft_names --write             # writes the drop-in's list of PEFT's names

The real package and the drop-in cannot be loaded under one name in one process; therefore each prints its own listing.
A listing has, for each module, what stands in it: the module that defines each name, the kind of the object, and for
classes and functions their parameters. Names that PEFT imports from other libraries are left out.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import json
import pkgutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[1] / "src" / "veneer" / "dropin" / "tables" / "names.json"

PRIVATE = """
peft.config._get_commit_hash
peft.optimizers.riemannian._RiemannianPreconditioner
peft.optimizers.riemannian._collect_lora_pairs
peft.tuners.lora.arrow._resolve_adapter_source
peft.tuners.lora.layer._LoraFactorsProxy
peft.tuners.lora.velora._compress_activations
peft.tuners.lora.velora._normalize_projection
peft.tuners.lora.velora._reconstruct_activations
peft.tuners.lora.velora._reshape_to_grouped_subtokens
peft.tuners.tuners_utils._filter_state_dict_by_key_prefixes
peft.tuners.tuners_utils._find_minimal_target_modules
peft.tuners.tuners_utils._get_tuner_state_dict_key_prefixes
peft.tuners.tuners_utils._maybe_include_all_linear_layers
peft.utils.other._freeze_adapter
peft.utils.other._get_module_names_tied_with_embedding
peft.utils.other._get_no_split_modules
peft.utils.other._get_submodules
peft.utils.other._set_adapter
"""
"""The private names that transformers, TRL, diffusers, accelerate, sentence-transformers or PEFT's tests import."""

LAZY = ("Linear4bit", "Linear8bitLt", "SVDLinear4bit", "SVDLinear8bitLt", "GPTQLoraLinear", "EetqLoraLinear")
"""Names that PEFT's packages import only when they are asked for."""


def names_of_peft() -> Iterator[str]:
    import peft

    yield "peft"
    for module in pkgutil.walk_packages(peft.__path__, "peft."):
        yield module.name


def listing() -> dict[str, Any]:
    """What the installed PEFT has: {module: {name: {"home": ..., "kind": ..., ...}}}."""
    modules = {name: importlib.import_module(name) for name in names_of_peft()}
    defined = {name: definitions(module) for name, module in modules.items()}
    everything: dict[str, Any] = {}
    for path, module in modules.items():
        everything[path] = {}
        found = {name: value for name, value in vars(module).items() if not isinstance(value, types.ModuleType)}
        found |= {name: getattr(module, name) for name in LAZY if hasattr(module, name)}
        for name, value in sorted(found.items()):
            home = home_of(path, name, value, defined)
            is_private = name.startswith("_") and f"{home}.{name}" not in PRIVATE.split()
            if home is None or is_private:
                continue
            details = described(value, is_pefts) if home == path else {}
            everything[path][name] = {"home": home} | details
    return everything


def definitions(module: Any) -> dict[str, str]:
    """The names that a module's source defines, or imports from PEFT, with the module they come from."""
    found: dict[str, str] = {}
    statements = ast.parse(Path(module.__file__).read_text()).body
    package = module.__name__ if hasattr(module, "__path__") else module.__name__.rpartition(".")[0]
    while statements:
        statement = statements.pop()
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found[statement.name] = module.__name__
        elif isinstance(statement, (ast.If, ast.Try, ast.With)):
            statements += statement.body + getattr(statement, "orelse", [])
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {target.id: module.__name__ for target in targets if isinstance(target, ast.Name)}
        elif isinstance(statement, ast.ImportFrom):
            source = statement.module or ""
            if statement.level:
                above = package.split(".")[: len(package.split(".")) - statement.level + 1]
                source = ".".join([*above, *filter(None, [source])])
            if source.split(".")[0] == "peft":
                found |= {alias.asname or alias.name: source for alias in statement.names}
    return found


def home_of(path: str, name: str, value: Any, defined: dict[str, dict[str, str]]) -> str | None:
    """The module of PEFT that defines a name; None for names of other libraries."""
    if isinstance(value, (type, types.FunctionType)) and is_pefts(value) and name in defined.get(value.__module__, {}):
        return str(value.__module__)
    while name in defined.get(path, {}):
        source = defined[path][name]
        if source == path:
            return path
        path = source
    return None


def is_pefts(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).split(".")[0] == "peft"


def described(value: Any, counts: Callable[[Any], bool]) -> dict[str, Any]:
    """The kind of an object, its parameters and, for a class, its public attributes.

    Args:
        counts: whether the attributes that a base class defines are listed.
    """
    if isinstance(value, type):
        return {"kind": "class", "parameters": parameters(value), "attributes": attributes(value, counts)}
    if callable(value):
        return {"kind": "function", "parameters": parameters(value)}
    return {"kind": "value", "type": type(value).__name__}


def attributes(owner: type, counts: Callable[[Any], bool]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(owner.__mro__):
        if not counts(base):
            continue
        for name in vars(base):
            if not name.startswith("_"):
                found[name] = attribute(owner, name)
    return found


def attribute(owner: type, name: str) -> Any:
    """ "property", "value", or the parameters of a method."""
    static = inspect.getattr_static(owner, name, None)
    if static is None:
        static = getattr(owner, name)  # given by the metaclass
    if isinstance(static, property):
        return "property"
    method = getattr(static, "__func__", static)
    return parameters(method) if callable(method) and not isinstance(method, type) else "value"


def parameters(function: Any) -> list[list[Any]] | None:
    """[name, kind, default] of each parameter; a default is given as text."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return None
    found = []
    for parameter in signature.parameters.values():
        default = None if parameter.default is parameter.empty else shown(parameter.default)
        found.append([parameter.name, parameter.kind.name, default])
    return found


def shown(default: Any) -> str:
    """A default as text; two libraries' own objects of one kind look the same."""
    if isinstance(default, enum.Enum):
        default = default.value  # PEFT's enums are strings
    if isinstance(default, type) or callable(default):
        return getattr(default, "__name__", type(default).__name__)
    text = repr(default)
    return type(default).__name__ if " at 0x" in text else text


def of_veneer(theirs: dict[str, Any]) -> dict[str, Any]:
    """What veneer has of a listing of PEFT's names."""
    import veneer

    veneer.install_as_peft()
    everything: dict[str, Any] = {}
    for path, names in theirs.items():
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            everything[path] = str(error)
            continue
        everything[path] = {}
        for name, expected in names.items():
            if hasattr(module, name):
                everything[path][name] = compared(getattr(module, name), expected)
    return everything


def compared(value: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """Veneer's object as `described`, with the attributes that PEFT's has."""
    found = described(value, lambda base: False)
    reason = getattr(value, "absent", None)
    if isinstance(reason, str):
        found["absent"] = reason
    if isinstance(value, type):
        names = [name for name in expected.get("attributes", ()) if hasattr(value, name)]
        found["attributes"] = {name: attribute(value, name) for name in names}
    return found


def write() -> None:
    """Write the drop-in's list: for each module its names, each with its home if that is another module."""
    everything = listing()
    modules: dict[str, str] = {}
    kinds: dict[str, str] = {}
    constructors: dict[str, str] = {}
    for path, names in everything.items():
        words = []
        for name, entry in names.items():
            words.append(name if entry["home"] == path else f"{entry['home']}:{name}")
            if entry["home"] == path:
                kinds[f"{path}.{name}"] = entry["kind"]
            if entry.get("kind") == "class" and path.startswith(CONSTRUCTED) and entry["parameters"]:
                constructors[f"{path}.{name}"] = written(entry["parameters"])
        modules[path] = " ".join(words)
    content = {"modules": modules, "kinds": kinds, "constructors": constructors}
    TABLE.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


CONSTRUCTED = ("peft.tuners.", "peft.config", "peft.utils.other")
"""The modules whose classes the drop-in makes from the list."""
STARS = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}


def written(parameters: list[list[Any]]) -> str:
    """Parameters as in Python's source; a default that is not a literal is written as `...`."""
    words = []
    for name, kind, default in parameters:
        if default is None:
            words.append(STARS.get(kind, "") + name)
            continue
        try:
            ast.literal_eval(default)
        except (ValueError, SyntaxError):
            default = "..."  # a factory or an object
        words.append(f"{name}={default}")
    return ", ".join(words)


def main() -> None:
    warnings.simplefilter("ignore")
    if sys.argv[1] == "--write":
        write()
    elif sys.argv[1] == "peft":
        print(json.dumps(listing()))
    else:
        print(json.dumps(of_veneer(json.loads(Path(sys.argv[2]).read_text()))))


if __name__ == "__main__":
    main()
